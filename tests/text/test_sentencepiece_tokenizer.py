import io
import json
import pickle

import numpy as np
import pytest
import sentencepiece
from raised import mentions

from dalle2_jax.cli import main
from dalle2_jax.errors import UserError
from dalle2_jax.text import (
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)

OBJECTS = ("red star", "red cross", "blue star", "blue cross")
CAPTIONS = [f"a {size} {object_name}" for size in ("small", "large") for object_name in OBJECTS]


@pytest.fixture(scope="module")
def tokenizer():
    return train_sentencepiece(CAPTIONS, 300)


def test_rows_have_start_and_end_tokens_and_padding(tokenizer):
    tokens, mask = tokenizer.encode(["a small red star", ""], 16)
    assert tokens.dtype == np.int32 and mask.dtype == bool and tokens.shape == mask.shape == (2, 16)
    assert tokens[:, 0].tolist() == [1, 1]
    assert [row[held][-1] for row, held in zip(tokens, mask, strict=True)] == [2, 2]
    assert (tokens[~mask] == 0).all() and (tokens[mask] != 0).all()
    assert tokens[1, :3].tolist() == [1, 2, 0]
    assert (np.diff(mask.astype(int), axis=1) <= 0).all()
    assert tokens.max() < tokenizer.vocab_size
    assert isinstance(tokenizer, Tokenizer)


def test_a_long_caption_is_truncated_before_its_end_token(tokenizer):
    captions = ["a", "a small red star " * 10]
    tokens, mask = tokenizer.encode(captions, 8)
    assert mask[1].all() and tokens[1, -1] == 2
    np.testing.assert_array_equal(tokens[1, :7], tokenizer.encode(captions, 99)[0][1, :7])
    assert tokenizer.truncated(captions, 8) == [1]
    exact = int(tokenizer.encode(["a small red star"], 99)[1].sum())
    assert tokenizer.truncated(["a small red star"], exact) == []
    assert tokenizer.truncated(["a small red star"], exact - 1) == [0]
    with pytest.raises(UserError, check=mentions("context_length", 2, 1)):
        tokenizer.encode(["a"], 1)


def test_any_unicode_is_preserved_in_normal_form(tokenizer):
    for text, expected in [("A RED Star", "a red star"), ("ＲＥＤ ﬁ", "red fi"), ("漢字 😀", "漢字 😀")]:
        tokens, _ = tokenizer.encode([text], 64)
        assert 3 not in tokens
        assert tokenizer.decode(tokens[0]) == expected
    np.testing.assert_array_equal(tokenizer.encode(["STAR"], 9)[0], tokenizer.encode(["star"], 9)[0])


def test_complete_words_become_pieces():
    words = train_sentencepiece(CAPTIONS, 2000)
    assert words.vocab_size < 2000  # as many as the captions support
    assert words.encode(["a small red star"], 9)[1].sum() == 4 + 2


def test_training_is_deterministic(tokenizer):
    again = train_sentencepiece(iter(CAPTIONS), 300)
    assert again == tokenizer and hash(again) == hash(tokenizer)
    assert train_sentencepiece(CAPTIONS[:5], 280) != tokenizer


def test_pickled_and_saved_copies_are_equal(tokenizer, tmp_path):
    tokenizer.encode(CAPTIONS, 8)
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer
    tokenizer.save(tmp_path / "clip")
    assert load_tokenizer(tmp_path / "clip") == tokenizer
    (tmp_path / "x.model").write_bytes(tokenizer.to_bytes())
    assert load_tokenizer(tmp_path / "x.model") == tokenizer
    assert sorted(path.name for path in (tmp_path / "clip").iterdir()) == ["tokenizer.json", "tokenizer.model"]


def test_invalid_arguments_raise_user_errors(tokenizer, tmp_path):
    with pytest.raises(UserError, check=mentions(tmp_path, "tokenizer.json", "missing")):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, check=mentions(tmp_path / "none.model")):
        load_tokenizer(tmp_path / "none.model")
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.to_bytes()[:500])
    with pytest.raises(UserError, check=mentions(tmp_path / "tokenizer.model", "sentencepiece model")):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "morse", "file": "x"}))
    with pytest.raises(UserError, check=mentions(tmp_path, "'morse'", "sentencepiece")):
        load_tokenizer(tmp_path)
    for damaged in (b'{"kind": "sente', b'{"kind": "sentence\xe9iece", "file": "x"}'):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        with pytest.raises(UserError, check=mentions(tmp_path / "tokenizer.json", "damaged")):
            load_tokenizer(tmp_path)
    with pytest.raises(UserError, check=mentions("no captions")):
        train_sentencepiece(["", "  "], 300)
    with pytest.raises(UserError, check=mentions("vocab_size", "greater than 260")):
        train_sentencepiece(CAPTIONS, 260)
    with pytest.raises(UserError, check=mentions("vocab_size 265", "required_chars")):
        train_sentencepiece(CAPTIONS, 265)


def test_a_model_with_other_control_tokens_is_rejected():
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=output, vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    with pytest.raises(UserError, check=mentions((0, 1, 2, 3), (-1, 1, 2, 0), "dalle2 text train")):
        SentencePieceTokenizer(output.getvalue())


def _run(capsys, *arguments):
    try:
        code = main(["text", *[str(argument) for argument in arguments]])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


def test_command_line_trains_from_text_and_from_shapes(tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    out = tmp_path / "new" / "text.model"
    code, captured = _run(capsys, "train", "--data", tmp_path / "captions.txt", "--vocab_size", 300, "--out", out)
    assert code == 0 and "300 pieces" in captured.out
    assert load_tokenizer(out) == train_sentencepiece(CAPTIONS, 300)
    code, captured = _run(
        capsys, "train", "--data", "shapes", "--limit", 500, "--vocab_size", 2000, "--out", tmp_path / "shapes.model"
    )
    assert code == 0 and "no more" in captured.out
    assert load_tokenizer(tmp_path / "shapes.model").truncated(["a small red star on a white background"], 10) == []


def test_the_command_reports_invalid_arguments_in_one_line(tmp_path, capsys):
    out = ("--out", tmp_path / "x.model")
    code, captured = _run(capsys, "train", "--data", "shopes", "--vocab_size", 300, *out)
    assert code == 1 and "'shopes'" in captured.err
    code, captured = _run(capsys, "train", "--data", f"folder:{tmp_path / 'none'}", "--vocab_size", 300, *out)
    assert code == 1 and f"{tmp_path / 'none'}" in captured.err
    code, captured = _run(capsys, "train", "--data", tmp_path / "none.txt", "--vocab_size", 300, *out)
    assert code == 1 and f"{tmp_path / 'none.txt'}" in captured.err
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    code, captured = _run(capsys, "train", "--data", tmp_path / "latin.txt", "--vocab_size", 300, *out)
    assert code == 1 and f"{tmp_path / 'latin.txt'}" in captured.err and "UTF-8" in captured.err
    (tmp_path / "file").write_text("")
    code, captured = _run(
        capsys, "train", "--data", "shapes", "--limit", 50, "--vocab_size", 300, "--out", tmp_path / "file" / "x.model"
    )
    assert code == 1 and captured.err.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "x.model").exists()
    assert _run(capsys, "train", "--data", "shapes")[0] == 2
    assert _run(capsys)[0] == 2
    code, captured = _run(capsys, "train", "--help")
    assert code == 0 and "example:" in captured.out
