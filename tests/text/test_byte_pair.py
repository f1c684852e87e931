"""Byte-pair tokenizers give the ids of the released tokenizers, and reject damaged files with one-line errors.

Recorded: tests/fixtures/text/clip_golden.json with openai/CLIP's tokenizer, glide_golden.json with GLIDE's, both on
the released vocabularies; clip_tiny (a Hugging Face folder of 64 merges, pad token "!") with transformers 4.46.3;
odd_unicode.json, texts sampled from all of Unicode, with all three rules, ftfy 6.3.1 and Unicode 14.
"""

import configparser
import fnmatch
import gzip
import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import UserError
from dalle2_jax.text import (
    ClipTokenizer,
    GlideTokenizer,
    Tokenizer,
    clip_tokenizer,
    glide_tokenizer,
    load_tokenizer,
    read_clip_tokenizer,
)
from dalle2_jax.text.merges import BYTE_LETTERS, BytePairs, read_merges, write_merges

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "text"
PROMPTS = ["a photo of a red panda eating noodles", "an oil painting of a lighthouse at dawn, zebra!"]


def recorded(name):
    return json.loads((FIXTURES / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def clip():
    return clip_tokenizer()


@pytest.fixture(scope="module")
def glide():
    return glide_tokenizer()


@pytest.fixture(scope="module")
def tiny():
    return read_clip_tokenizer(FIXTURES / "clip_tiny")


def test_clip_gives_the_recorded_ids(clip):
    assert (clip.vocab_size, clip.begin, clip.end, clip.pad) == (49_408, 49_406, 49_407, 0)
    for case in recorded("clip_golden"):
        assert clip.ids(case["text"]) == case["ids"], case["text"]


def test_glide_gives_the_recorded_rows(glide):
    assert (glide.vocab_size, glide.pad) == (50_257, 50_256)
    for case in recorded("glide_golden"):
        assert glide.ids(case["text"]) == case["ids"], case["text"]
        tokens, mask = glide.encode([case["text"]], 128)
        assert [tokens[0].tolist(), mask[0].tolist()] == case["padded128"]


def test_a_hugging_face_folder_gives_the_recorded_rows(tiny):
    golden = recorded("clip_tiny_golden")
    for captions, name in ((PROMPTS, ""), (["", ""], "uncond_")):
        tokens, mask = tiny.encode(captions, 77)
        assert tokens.tolist() == golden[f"{name}input_ids"]
        assert mask.astype(int).tolist() == golden[f"{name}attention_mask"]


def test_odd_unicode_gives_the_recorded_ids(clip, glide, tiny):
    cases = recorded("odd_unicode")
    assert len(cases) > 100
    for case in cases:
        assert clip.ids(case["text"]) == case["clip"], ascii(case["text"])
        assert glide.ids(case["text"]) == case["glide"], ascii(case["text"])
        if "clip_tiny" in case:
            assert [tiny.begin, *tiny.ids(case["text"]), tiny.end] == case["clip_tiny"], ascii(case["text"])


@pytest.mark.parametrize("which", ["clip", "glide", "tiny"])
def test_every_text_has_ids_below_the_vocabulary_size(which, request):
    tokenizer = request.getfixturevalue(which)
    random = np.random.default_rng(0)
    texts = ["".join(map(chr, random.integers(0, bound, 40))) for bound in (128, 0x300, 0x110000) for _ in range(20)]
    texts += ["\ud83d\udc3c", "\ud83d", "a\udc00b", "&#xd800;", "\0", " ", "<|endoftext|>" * 3]
    tokens, mask = tokenizer.encode(texts, 300)
    assert tokens.dtype == np.int32 and mask.dtype == bool and tokens.shape == mask.shape == (len(texts), 300)
    assert tokens.min() >= 0 and tokens.max() < tokenizer.vocab_size
    assert (tokens[~mask] == tokenizer.pad).all() and (np.diff(mask.astype(int), axis=1) <= 0).all()
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.ids("\ud83d\udc3c") == tokenizer.ids("🐼")


def test_a_long_clip_caption_is_truncated_before_its_end_token(clip):
    captions = ["a cat", "word " * 100, "a cat in a hat"]
    tokens, mask = clip.encode(captions, 7)
    assert tokens[:, 0].tolist() == [49_406] * 3 and mask.sum(1).tolist() == [4, 7, 7]
    assert tokens[1].tolist() == [49_406, *[clip.ids("word")[0]] * 5, 49_407]
    assert clip.truncated(captions, 7) == [1] and clip.truncated(captions, 6) == [1, 2]
    with pytest.raises(UserError, check=mentions("context_length", 2, 1)):
        clip.encode(["a"], 1)


def test_a_long_glide_caption_is_truncated_without_an_end_token(glide):
    captions = ["a cat in a hat", "word " * 100]
    tokens, mask = glide.encode(captions, 5)
    assert tokens[0].tolist() == glide.ids(captions[0]) and mask.all() and 50_256 not in tokens
    assert glide.truncated(captions, 5) == [1] and glide.truncated(captions, 4) == [0, 1]
    with pytest.raises(UserError, check=mentions("context_length", 1, 0)):
        glide.encode(["a"], 0)


def test_smaller_vocabularies_are_the_first_merges(clip):
    small = clip_tokenizer(600)
    assert (small.vocab_size, small.begin, small.end) == (600, 598, 599)
    assert clip_tokenizer(514).ids("at") == [64, 339] and len(small.ids("the")) == 1 == len(clip.ids("the"))
    assert (glide_tokenizer(300).vocab_size, glide_tokenizer(300).pad) == (300, 299)
    assert glide_tokenizer(257).ids("a b") == [64, 220, 65]
    for make, sizes in ((clip_tokenizer, (513, 49_409)), (glide_tokenizer, (100, 50_258))):
        for size in sizes:
            with pytest.raises(UserError, check=mentions("vocab_size", size)):
                make(size)


@pytest.mark.parametrize("which", ["clip", "glide", "tiny"])
def test_pickled_and_saved_copies_are_equal(which, request, tmp_path):
    tokenizer = request.getfixturevalue(which)
    tokenizer.save(tmp_path)
    assert "tokenizer.json" in [path.name for path in tmp_path.iterdir()]
    for copy in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert type(copy) is type(tokenizer) and copy == tokenizer and hash(copy) == hash(tokenizer)
        assert repr(copy) == repr(tokenizer) and str(tokenizer.vocab_size) in repr(copy)
        for ours, theirs in zip(copy.encode(PROMPTS, 20), tokenizer.encode(PROMPTS, 20), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert tokenizer != clip_tokenizer(600) and tokenizer != glide_tokenizer(600)


def test_reading_damaged_saved_tokenizers(tmp_path):
    for tokenizer, file in ((clip_tokenizer(600), "byte_pair.json.gz"), (glide_tokenizer(600), "merges.txt.gz")):
        tokenizer.save(tmp_path)
        content_of_file = (tmp_path / file).read_bytes()
        flipped = bytes([*content_of_file[:100], content_of_file[100] ^ 255, *content_of_file[101:]])
        for content in (
            content_of_file[:-20],
            content_of_file[:300],
            flipped,
            gzip.compress(b"\xff\n"),
            gzip.compress(b'{"merges": [1]}'),
        ):
            (tmp_path / file).write_bytes(content)
            with pytest.raises(UserError, check=mentions(tmp_path / file)):
                load_tokenizer(tmp_path)


def test_merges_are_applied_in_the_order_learned():
    """The pair learned first is merged first, at any position; of equal pairs the leftmost is merged first."""
    tokens = {token: number for number, token in enumerate([*BYTE_LETTERS, "bc", "ab", "abc", "aa", "aaa"])}
    pairs = BytePairs(tokens, [("b", "c"), ("a", "b"), ("a", "bc"), ("a", "a"), ("aa", "a")])

    def pieces(word):
        return [next(token for token, number in tokens.items() if number == piece) for piece in pairs(word)]

    assert pieces("abc") == ["abc"] and pieces("abab") == ["ab", "ab"] and pieces("abcb") == ["abc", "b"]
    assert pieces("aaaaa") == ["aa", "aaa"] and pieces("é") == [BYTE_LETTERS[0xC3], BYTE_LETTERS[0xA9]]


def test_tokenizing_is_fast_enough_for_training(clip):
    """Over 1,000 uncached captions a second, even on a busy machine; text without spaces takes no quadratic time."""
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(letters, 6)) for _ in range(2_000)]
    captions = [" ".join(random.choice(words, 12)) for _ in range(2_000)]
    start = time.process_time()
    clip.encode(captions, 77)
    clip.ids("".join(random.choice(letters, 20_000)))
    assert time.process_time() - start < 2


def test_merges_are_written_and_read_back():
    merges = (("a", "b"), ("Ġ", "ab"))
    assert read_merges(write_merges(merges)) == merges == read_merges(b"a b\r\n\xc4\xa0 ab\r\n")
    assert ClipTokenizer.from_merges(merges[:1]).vocab_size == 515
    assert GlideTokenizer.from_bytes(write_merges(merges)) == GlideTokenizer(merges)
    with pytest.raises(UserError, check=mentions("'xy'", "merge 1", "'z'")):
        GlideTokenizer([("xy", "z")])


def test_an_installed_package_carries_the_vocabularies():
    """Every data file of `dalle2_jax.text` is listed in setup.cfg."""
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    patterns = options["options.package_data"]["dalle2_jax.text"].split(", ")
    others = [path.name for path in (ROOT / "dalle2_jax" / "text").glob("*.*") if path.suffix != ".py"]
    assert len(others) == 3
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in patterns) for name in others)
