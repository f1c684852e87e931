"""Untrusted tokenizers: sizes are checked before memory is allocated, and damaged files raise one error type."""

import gzip
import json
import os

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import UserError
from dalle2_jax.text import (
    ClipTokenizer,
    LabelTokenizer,
    SentencePieceTokenizer,
    clip_tokenizer,
    load_tokenizer,
    storage,
    train_sentencepiece,
)
from dalle2_jax.text.merges import decompress


def test_a_small_gzip_file_that_expands_to_much_text_is_rejected(monkeypatch):
    bomb = gzip.compress(bytes(2**27))
    assert len(bomb) < 2**18
    for read in (decompress, ClipTokenizer.from_bytes):
        with pytest.raises(UserError):
            read(bomb)
    for broken in (gzip.compress(b"abc")[:-4], b"\x1f\x8b\x08" + b"x" * 40, b"\x1f\x8b"):
        with pytest.raises(UserError):
            decompress(broken)
    assert decompress(gzip.compress(b"abc")) == b"abc"


@pytest.mark.parametrize(
    "change",
    [{"begin": 10**9}, {"end": -1}, {"pad": "0"}, {"tokens": 3}, {"unknown": 10**6}, {"literal": 3}, {"merges": 3}],
)
def test_a_damaged_clip_tokenizer_raises_one_error(change):
    fields = json.loads(gzip.decompress(clip_tokenizer(514 + 50).to_bytes()))
    with pytest.raises(UserError, check=mentions("CLIP tokenizer", "damaged")):
        ClipTokenizer.from_bytes(json.dumps({**fields, **change}).encode())
    with pytest.raises(UserError, check=mentions("CLIP tokenizer", "damaged")):
        ClipTokenizer.from_bytes(b"[" * 100_000)


@pytest.mark.parametrize("content", [b'{"count": 1e300}', b'{"count": %s}' % (b"9" * 30), b"[" * 10**5, b"[]", b"{}"])
def test_a_damaged_label_tokenizer_raises_one_error(content):
    with pytest.raises(UserError):
        LabelTokenizer.from_bytes(content)


def test_a_tokenizer_file_has_a_maximum_size(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MAX_BYTES", 100)
    (tmp_path / "large.model").write_bytes(bytes(101))
    os.mkfifo(tmp_path / "pipe.model")
    (tmp_path / "folder.model").mkdir()
    for name, reason in (("large", "100 bytes"), ("pipe", "regular file"), ("folder", "directory")):
        with pytest.raises(UserError, check=mentions(tmp_path / f"{name}.model", reason)):
            load_tokenizer(tmp_path / f"{name}.model")


def test_damaged_sentencepiece_models_raise_one_error():
    model, rng = train_sentencepiece(["a red circle", "a blue square"] * 9, 290).to_bytes(), np.random.default_rng(0)
    SentencePieceTokenizer(model)
    for number in range(60):
        changed = bytearray(model[: rng.integers(1, len(model))] if number % 3 == 0 else model)
        for _ in range(rng.integers(0, 9)):
            changed[rng.integers(len(changed))] = rng.integers(256)
        try:
            tokens, _ = SentencePieceTokenizer(bytes(changed)).encode(["a red square ü"], 16)
        except UserError:
            continue
        assert tokens.min() >= 0
