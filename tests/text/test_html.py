"""HTML entities in captions: replaced as CLIP's ``basic_clean`` does it, or unchanged, as in transformers 5."""

import gzip
import json
import pickle

import pytest
from raised import mentions

from dalle2_jax.errors import UserError
from dalle2_jax.text import (
    ClipTokenizer,
    clip_tokenizer,
    load_tokenizer,
    write_clip_tokenizer,
)


@pytest.fixture(scope="module")
def clip():
    return clip_tokenizer(1000)


@pytest.fixture(scope="module")
def without_unescaping(clip):
    return clip.with_html_unescape(False)


@pytest.mark.parametrize("caption", ["cats &amp; dogs", "cats &amp;amp; dogs", "cats &amp;amp;amp; dogs"])
def test_entities_are_replaced_unless_the_option_is_off(clip, without_unescaping, caption):
    assert clip.ids(caption) == clip.ids("cats & dogs")
    spaced = caption.replace("&", " & ").replace(";", " ; ")
    assert without_unescaping.ids(caption) == without_unescaping.ids(spaced) != clip.ids(caption)


def test_entities_in_text_with_tags_are_replaced_twice(clip):
    """``ftfy.fix_text`` does not change text with "<", and ``html.unescape`` is applied twice."""
    assert clip.ids("<b> &amp;amp;amp;") == clip.ids("<b> &amp;".replace("&amp;", "& amp;"))


@pytest.mark.parametrize("caption", ["a red circle", "“quoted” ﬁne", "Two  Words\n3", "a & b", ""])
def test_captions_without_entities_give_the_same_tokens(clip, without_unescaping, caption):
    assert clip.ids(caption) == without_unescaping.ids(caption)


def test_the_option_is_stored_with_the_tokenizer(clip, without_unescaping, tmp_path):
    assert clip.html_unescape and not without_unescaping.html_unescape and clip != without_unescaping
    assert without_unescaping.with_html_unescape(True) == clip
    for tokenizer in (clip, without_unescaping):
        tokenizer.save(tmp_path)
        assert load_tokenizer(tmp_path) == pickle.loads(pickle.dumps(tokenizer)) == tokenizer
        assert load_tokenizer(tmp_path).ids("&amp;") == tokenizer.ids("&amp;")


def test_the_default_is_stored_as_by_earlier_versions(clip):
    """Earlier versions reject a file with the field."""
    assert "html_unescape" not in json.loads(gzip.decompress(clip.to_bytes()))


def test_an_invalid_value_of_the_option_is_named(without_unescaping):
    fields = json.loads(gzip.decompress(without_unescaping.to_bytes()))
    assert fields["html_unescape"] is False
    with pytest.raises(UserError, check=mentions("CLIP tokenizer", "damaged")):
        ClipTokenizer.from_bytes(gzip.compress(json.dumps(fields | {"html_unescape": "no"}).encode()))


def test_the_option_is_exported_to_hugging_faces_format(without_unescaping, tmp_path):
    write_clip_tokenizer(tmp_path, without_unescaping, 77)
    assert (tmp_path / "vocab.json").is_file()
