"""What byte-pair tokenizers do to a caption before their merges: cleaning it and cutting it into words.

The rules are those that CLIP (Radford et al., arXiv 2103.00020) and GLIDE (Nichol et al., arXiv 2112.10741) were
trained with. CLIP's captions were mended: curly quotes become straight ones, ligatures and wide letters plain
ones, letters and their accents one character, HTML entities what they stand for, and control characters go.
Text that was once decoded wrongly (mojibake) is left as it stands.
"""

import functools
import html
import re
import sys
import unicodedata

_LIGATURES = "ĲĳŉǄǅǆǇǈǉǊǋǌǱǲǳﬀﬁﬂﬃﬄﬆ"
_CONTROLS = "\\x00-\\x08\\x0b\\x0e-\\x1f\\x7f\\u206a-\\u206f\\ufeff\\ufff9-\\ufffc"
_SURROGATE = re.compile("[\\ud800-\\udfff]")
_REMOVED = re.compile(f"[{_CONTROLS}]")


def clip_words(caption: str, literal: re.Pattern[str] | None = None) -> list[str]:
    """Returns the words of a caption as CLIP reads them: mended, in lower case, every digit a word of its own.

    Args:
        caption: any text.
        literal: splits off, before anything else is cut, what stands for a token of its own; one group.
    """
    text = caption if "<" in caption else html.unescape(caption)  # what has no tags is mended without entities
    text = html.unescape(html.unescape(_mended(text)))
    text = " ".join(text.split()).lower()
    find = _clip_pattern().findall
    if literal is None:
        return find(text)
    parts = literal.split(text)  # text, literal, text, ...
    return [word for place, part in enumerate(parts) for word in ([part] if place % 2 else find(part))]


def glide_words(caption: str) -> list[str]:
    """Returns the words of a caption as GLIDE reads them: in lower case, a word with the space before it."""
    return _glide_pattern().findall(_whole(caption).lower())


def _whole(text: str) -> str:
    """Joins pairs of surrogates; those alone, which no encoding can write, become U+FFFD."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _mended(text: str) -> str:
    text = _whole(text.translate(_table()))
    return unicodedata.normalize("NFC", _REMOVED.sub("", text))


@functools.cache
def _table() -> dict[int, str]:
    """What each character that is mended becomes."""
    quotes = dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
    plain = {letter: unicodedata.normalize("NFKC", letter) for letter in _LIGATURES} | {"ﬅ": "ſt"}
    plain |= {chr(code): unicodedata.normalize("NFKC", chr(code)) for code in (0x3000, *range(0xFF01, 0xFFF0))}
    # control characters of Latin-1 that were signs of Windows-1252
    signs = {chr(code): bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)}
    mended = plain | signs | quotes
    return {ord(old): "".join(quotes.get(letter, letter) for letter in new) for old, new in mended.items()}


@functools.cache
def _clip_pattern() -> re.Pattern[str]:
    letter, number, _, other = _classes()
    return re.compile(rf"<\|startoftext\|>|<\|endoftext\|>|(?i:'s|'t|'re|'ve|'m|'ll|'d)|{letter}+|{number}|{other}+")


@functools.cache
def _glide_pattern() -> re.Pattern[str]:
    letter, number, space, other = _classes()
    return re.compile(rf"'s|'t|'re|'ve|'m|'ll|'d| ?{letter}+| ?{number}+| ?{other}+|{space}+(?![\S\x1c-\x1f])|{space}+")


@functools.cache
def _classes() -> tuple[str, str, str, str]:
    r"""Returns patterns of one Unicode letter, number, space, and other character.

    Python's ``\w`` is letters, numbers of all three kinds and the underscore, and its ``\d`` the decimal digits,
    so that the numbers of the two other kinds are all that must be listed. Its ``\s`` has four separators too
    many (U+001C to U+001F).
    """
    everything = map(chr, range(sys.maxunicode + 1))
    numbers = "".join(one for one in everything if unicodedata.category(one) in ("Nl", "No"))
    return rf"[^\W\d_{numbers}]", rf"[\d{numbers}]", r"[^\S\x1c-\x1f]", r"(?:[^\w\s]|[_\x1c-\x1f])"
