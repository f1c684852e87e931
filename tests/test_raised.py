"""What tests assert of errors: `mentions` finds facts as whole words, compares fields, and takes no sentences."""

import errno
import os
from pathlib import Path

import pytest
from raised import is_mentioned, mentions, plain_words

from dalle2_jax.errors import ConfigError, DataError

MESSAGE = "config.optim.lr must be above 0 and at most 1.5, got -3 in /data/9.tar: did you mean 'beta_1'? See step 12."


@pytest.mark.parametrize(
    "fact",
    [
        "config.optim.lr",
        "lr",
        "optim",
        "0",
        "1.5",
        "-3",
        "/data",
        Path("/data/9.tar"),
        "'beta_1'",
        "step 12",
        "at most",
    ],
)
def test_whole_words_are_found(fact):
    assert is_mentioned(fact, MESSAGE)


@pytest.mark.parametrize(
    "fact",
    ["l", "opt", "1", "5", "3", "beta", "beta_", "step 1", "2", "'beta'", "data/9.ta", Path("/data"), Path("/data/9")],
)
def test_parts_of_words_and_numbers_are_not(fact):
    assert not is_mentioned(fact, MESSAGE)


@pytest.mark.parametrize(
    "check",
    [
        mentions("optim.lr", "optim.eps"),
        mentions("optim.lr", 5),
        mentions("optim.lr", field="optim"),
        mentions(field="optim.lr", path=None),
    ],
)
def test_an_error_with_another_fact_or_field_fails(check):
    with pytest.raises((AssertionError, AttributeError)):
        check(ConfigError("config.optim.lr is 15", "optim.lr"))


def test_an_error_of_two_lines_fails():
    with pytest.raises(AssertionError):
        mentions("a.png")(DataError("a.png\nb.png"))


def test_facts_and_fields_that_agree():
    assert mentions("optim.lr", 1.5, field="optim.lr")(ConfigError("config.optim.lr is 1.5", "optim.lr"))
    assert mentions(Path("a.png"), path="a.png")(DataError("no image a.png", Path("a.png")))
    assert mentions(os.strerror(errno.ENOSPC))(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def test_sentences_are_no_facts():
    assert plain_words("The last good checkpoint is none.") == 6
    assert plain_words("unknown stage 'clop': did you mean 'clip'") == 3
    assert plain_words("use --config.data.path of clip's page") == 3
    for sentence in ("there is no system", "it must be positive, not 0", "is not an image"):
        with pytest.raises(ValueError):
            mentions(sentence)
