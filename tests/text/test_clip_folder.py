"""CLIP tokenizers in the folders of public checkpoints: equal tokens in every form; errors of damaged files."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from raised import mentions

from dalle2_jax.errors import UserError
from dalle2_jax.text import clip_tokenizer, read_clip_tokenizer, write_clip_tokenizer
from dalle2_jax.text.merges import BYTE_LETTERS, write_merges

FIXTURES = Path(__file__).parents[1] / "fixtures" / "text"


@pytest.fixture(scope="module")
def clip():
    return clip_tokenizer()


@pytest.fixture(scope="module")
def tiny():
    return read_clip_tokenizer(FIXTURES / "clip_tiny")


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(FIXTURES / "clip_tiny", tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def fast_form(folder, as_pairs):
    """Replaces a folder's vocab.json and merges.txt by the newer tokenizer.json."""
    merges = [line if not as_pairs else line.split() for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    vocabulary = json.loads((folder / "vocab.json").read_text())
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model}))
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()


def test_reading_inverts_writing(tmp_path, folder, tiny):
    write_clip_tokenizer(tmp_path / "again", tiny, 77)
    assert read_clip_tokenizer(tmp_path / "again") == tiny
    for name in ("vocab.json", "merges.txt"):
        ours, theirs = ((place / name).read_text().strip() for place in (tmp_path / "again", folder))
        assert json.loads(ours) == json.loads(theirs) if name == "vocab.json" else ours == theirs


def test_openai_tokenizer_preserves_exclamation_marks_in_a_folder(tmp_path):
    """In OpenAI's vocabulary "!" is a word; as a folder's pad token it would be split off anywhere in a caption."""
    ours = clip_tokenizer(600)
    write_clip_tokenizer(tmp_path, ours, 12)
    again = read_clip_tokenizer(tmp_path)
    assert again.ids("Zebra! no!go") == ours.ids("Zebra! no!go")
    assert (again.begin, again.end, again.pad) == (598, 599, 599)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 12 and config["tokenizer_class"] == "CLIPTokenizer"


@pytest.mark.parametrize("as_pairs", [False, True])
def test_the_newer_file_format_gives_the_same_tokens(folder, tiny, as_pairs):
    fast_form(folder, as_pairs)
    assert read_clip_tokenizer(folder) == tiny
    (folder / "special_tokens_map.json").unlink()  # tokenizer_config.json names the same tokens
    assert read_clip_tokenizer(folder) == tiny


def test_a_folder_without_a_pad_token_pads_with_0(folder, tiny):
    (folder / "special_tokens_map.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    plain = read_clip_tokenizer(folder)
    assert (plain.begin, plain.end, plain.pad) == (576, 577, 0)
    assert plain.ids("zebra!")[-1] == 256 and tiny.ids("zebra!")[-1] == 0  # "!" is a word here, the pad token there


def test_a_folder_may_pad_with_the_end_token(folder):
    change(folder / "special_tokens_map.json", '"pad_token": "!"', '"pad_token": "<|endoftext|>"')
    tokenizer = read_clip_tokenizer(folder)
    tokens, mask = tokenizer.encode(["zebra!"], 12)
    assert tokenizer.pad == 577 and tokens[0, -1] == 577 and not mask[0, -1] and 256 in tokens


def test_a_folder_with_openais_vocabulary_gives_the_released_tokenizer(tmp_path, clip):
    merges = [line.split() for line in gzip.decompress(write_merges(clip._fields[1])).decode().splitlines()[1:]]
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(write_merges([*merges, ["z", "q"], ["q", "z"]]))
    assert read_clip_tokenizer(tmp_path) == clip
    content = gzip.decompress((tmp_path / "bpe_simple_vocab_16e6.txt.gz").read_bytes())
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").unlink()
    (tmp_path / "bpe_simple_vocab_16e6.txt").write_bytes(content)
    assert read_clip_tokenizer(str(tmp_path)) == clip


def test_bytes_without_a_token_are_the_unknown_token(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    order = [token for token in sorted(vocabulary, key=vocabulary.get) if token != "Ā"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(order)}))
    tokenizer = read_clip_tokenizer(folder)
    assert tokenizer._pairs._inner[0] == tokenizer.end == 576
    (folder / "special_tokens_map.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, check=mentions(folder, "byte 'Ā'", "'</w>'")):
        read_clip_tokenizer(folder)


def cut_vocabulary(folder):
    text = (folder / "vocab.json").read_text()
    (folder / "vocab.json").write_text(text[: len(text) // 2])


def renumber(folder):
    change(folder / "vocab.json", '"!": 0', '"!": 1')


def other_token(folder):
    change(folder / "vocab.json", '"ing</w>"', '"gni</w>"')


def odd_line(folder):
    change(folder / "merges.txt", "in g</w>", "ing</w>")


def cut_merges(folder):
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[:-3]))


def latin_merges(folder):
    (folder / "merges.txt").write_bytes(b"#version: 0.2\nt h\n\xe9 a\n")


def other_end(folder):
    change(folder / "special_tokens_map.json", '"content": "<|endoftext|>"', '"content": "</s>"')


def a_list_of_names(folder):
    (folder / "special_tokens_map.json").write_text("[]")


def another_family(folder):
    """Writes a vocabulary like GPT-2's, without separate tokens for the ends of words."""
    merges = (("t", "h"),)
    tokens = [*BYTE_LETTERS, "th", "<|startoftext|>", "<|endoftext|>"]
    (folder / "merges.txt").write_bytes(gzip.decompress(write_merges(merges)))
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "special_tokens_map.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def no_merges(folder):
    (folder / "merges.txt").unlink()


def another_model(folder):
    no_merges(folder)
    (folder / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": [["a", 0.1]]}}')


def cut_list(folder):
    no_merges(folder)
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(write_merges((("t", "h"),))[:-9])


@pytest.mark.parametrize(
    ("damage", "facts"),
    [
        (cut_vocabulary, ["vocab.json", "damaged", "JSON"]),
        (renumber, ["ids", "0, 1, 2"]),
        (other_token, ["'ing</w>'", "merge 4", "'in'", "'g</w>'"]),
        (odd_line, ["merges.txt", "line 5", "'ing</w>'"]),
        (cut_merges, ["merges", "'ightho'", 3]),
        (latin_merges, ["merges.txt", "UTF-8"]),
        (other_end, ["'</s>'", "end token"]),
        (a_list_of_names, ["special_tokens_map.json", "damaged"]),
        (another_family, ["</w>", "CLIP tokenizer"]),
        (no_merges, ["vocab.json", "merges.txt", "bpe_simple_vocab_16e6.txt.gz", "tokenizer.json"]),
        (another_model, ["tokenizer.json", "byte-pair vocabulary"]),
        (cut_list, ["bpe_simple_vocab_16e6.txt.gz", "gzipped file"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_errors_of_damaged_folders(folder, damage, facts):
    damage(folder)
    with pytest.raises(UserError, check=mentions(folder, *facts)):
        read_clip_tokenizer(folder)
