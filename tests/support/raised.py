"""Checks of what an error is about: its fields, and the facts that its message mentions, however it is worded."""

import errno
import os
import re
from pathlib import Path

MAX_PLAIN_WORDS = 3
"""Of a fact. More in a row are a sentence, which tests leave to whoever writes the message."""

SYSTEM_REASONS = frozenset(map(os.strerror, errno.errorcode))
"""What the operating system calls its errors; facts of any length."""


def plain_words(text):
    """Returns the largest number of plain words in a row: letters alone, so no name, number, path, option or quote."""
    longest = length = 0
    for word in text.split():
        length = length + 1 if re.fullmatch(r"[A-Za-z]+(['-][A-Za-z]+)*", word.strip(".,:;()")) else 0
        longest = max(longest, length)
    return longest


def is_mentioned(fact, message):
    """Returns whether a fact is in a message as whole words.

    5 is not in "15", "0.5" or "-5", eta not in "beta", and Path("runs/a") not in "runs/a/b" or "runs/a.txt".
    """
    text = str(fact)
    before = r"(?<!\w)" if re.match(r"\w", text) else ""
    after = r"(?!\w)" if re.search(r"\w$", text) else ""
    if re.match(r"\d|(inf|nan)$", text):
        before += r"(?<!\d\.)(?<!\s-)"
    if re.search(r"\d$", text):
        after += r"(?!\.\d)"
    if isinstance(fact, Path):
        after += r"(?!/|\.\w)"
    return re.search(before + re.escape(text) + after, message) is not None


def mentions(*facts, **fields):
    """Returns a check for ``pytest.raises``: an error has these fields, and its one line mentions these facts.

    Args:
      facts: names of fields, options, files and stages, numbers, values that the user gave, what to use instead.
      fields: values of the error's attributes, by name; a Path equals its text.

    Raises:
      ValueError: a fact is a sentence.
    """
    texts = [str(fact) for fact in facts if not isinstance(fact, Path)]
    sentences = [text for text in texts if plain_words(text) > MAX_PLAIN_WORDS and text not in SYSTEM_REASONS]
    if sentences:
        raise ValueError(f"sentences instead of facts: {sentences}")

    def check(error):
        message = str(error).strip()
        assert "\n" not in message, f"more than one line: {message!r}"
        lost = [str(fact) for fact in facts if not is_mentioned(fact, message)]
        assert not lost, f"not mentioned: {lost} in {message!r}"
        for name, value in fields.items():
            found = getattr(error, name)
            assert _comparable(found) == _comparable(value), f"{name} is {found!r}, not {value!r}: {message}"
        return True

    return check


def _comparable(value):
    return str(value) if isinstance(value, Path) else value
