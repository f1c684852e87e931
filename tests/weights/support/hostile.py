"""Hostile copies of a JSON file: seeded mutations of its values, fields and bytes."""

import copy
import json
from random import Random

DEEP = "[" * 100_000
VALUES = (
    *(None, True, False, 0, -1, 1, 2, 7, 1000, 10**7, 2**31, -(2**63), 10**30, 0.5, -0.0, 1e308, 5e-324),
    *("", "x", "3", "null", "../../etc/passwd", "\x00", "two\nlines", "\ud800", "é" * 40, "a" * 100_000),
    *([], {}, [None], [[[[]]]], [1, "2", None], [10**12] * 9, list(range(5000)), {"": None}, {"a": {"b": {"c": 1}}}),
)
"""Values that replace a value."""

TEXTS = (
    *("", " ", "{", "[]", "null", "1", '"text"', "{]", "\ufeff{}", "NaN", "1" * 10_000, DEEP, '{"a":' * 100_000),
    *('{"a": NaN}', '{"a": 1e999}', '{"a": -Infinity}', "{'a': 1}", '{"a": 1,}', "\x00" * 64),
)
"""Texts that replace the file."""


def _places(content, path=()):
    """Yields the path of every nested value."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _changed(content, random):
    """Returns the content with one to three values or fields changed, as JSON text."""
    content = copy.deepcopy(content)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = [*_places(content)]
        if not places:
            break
        *parents, last = random.choice(places)
        inner = content
        for key in parents:
            inner = inner[key]
        how = random.randrange(8)
        if how == 0:
            del inner[last]
        elif how == 1 and isinstance(inner, dict):
            inner[random.choice(("x", "\n", "../x", f"{last}_", "_class_name"))] = inner.pop(last)
        elif how == 2 and isinstance(inner[last], int | float):
            inner[last] = inner[last] * random.choice((-1, 2, 10, 1e6, 10**9)) + random.choice((0, 1, -1))
        elif how == 3:
            inner[last] = [copy.deepcopy(inner[last]) for _ in range(random.choice((1, 2, 50)))]
        else:
            inner[last] = copy.deepcopy(random.choice(VALUES))
    return json.dumps(content)


def _damaged(text, random):
    """Returns the text with bytes cut out, repeated or replaced."""
    content = bytearray(text.encode())
    start = random.randrange(len(content))
    end = min(len(content), start + random.choice((1, 1, 4, 40, 400)))
    content[start:end] = random.choice((b"", bytes(random.randbytes(3)), content[start:end] * 3, b"[", b"}", b"9" * 30))
    return bytes(content)


def mutations(path, count, seed=0):
    """Yields ``count`` hostile contents (bytes) of a JSON file, `TEXTS` first."""
    random, text = Random(f"{seed} {path.name} {path.parent.name}"), path.read_text()
    content = json.loads(text)
    for number in range(count):
        if number < len(TEXTS):
            yield TEXTS[number].encode("utf-8", "surrogatepass")
        elif number % 5 == 0:
            yield _damaged(text, random)
        else:
            yield _changed(content, random).encode("utf-8", "surrogatepass")
