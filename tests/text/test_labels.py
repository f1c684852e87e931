"""Class labels as tokens: integers below the count."""

import pickle

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import UserError
from dalle2_jax.text import LabelTokenizer, Tokenizer, load_tokenizer


def test_integers_below_the_count_are_classes_and_other_text_is_unconditional():
    captions = ["0", "7", " 9 ", "09", "10", "-1", "1.0", "", "a cat", "²", "٣", "9" * 5000]
    tokens, mask = LabelTokenizer(10).encode(captions, 1)
    assert tokens.dtype == np.int32 and mask.dtype == bool and tokens.shape == mask.shape == (12, 1)
    assert tokens[:, 0].tolist() == [0, 7, 9, 9] + [0] * 8
    assert mask[:, 0].tolist() == [True] * 4 + [False] * 8
    assert LabelTokenizer(10).encode([], 1)[0].shape == (0, 1)


def test_pickled_and_saved_copies_are_equal(tmp_path):
    tokenizer = LabelTokenizer(1000)
    tokenizer.save(tmp_path)
    for copy in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert copy == tokenizer and hash(copy) == hash(tokenizer) and repr(copy) == "LabelTokenizer(1000)"
    assert tokenizer != LabelTokenizer(999) and tokenizer.vocab_size == 1000
    assert isinstance(tokenizer, Tokenizer) and tokenizer.truncated(["5", "word " * 99], 1) == []


def test_invalid_files_raise_user_errors(tmp_path):
    with pytest.raises(UserError, check=mentions("number of classes", 1, 0)):
        LabelTokenizer(0)
    with pytest.raises(UserError, check=mentions("context_length", 1, 77)):
        LabelTokenizer(3).encode(["1"], 77)
    LabelTokenizer(3).save(tmp_path)
    for content in ("", "[]", '{"count": "3"}', '{"count": 0}', '{"count": 2.5}', "\x00"):
        (tmp_path / "labels.json").write_text(content)
        with pytest.raises(UserError, check=mentions(tmp_path / "labels.json", "classes")):
            load_tokenizer(tmp_path)
