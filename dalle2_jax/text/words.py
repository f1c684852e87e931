"""Splits captions into words for byte-pair tokenizers, with the rules of CLIP's and GLIDE's training.

Sources: CLIP (Radford et al., arXiv 2103.00020) and GLIDE (Nichol et al., arXiv 2112.10741). CLIP normalises captions:
curly quotes become straight, ligatures and full-width letters become plain, letters are composed with their accents
(NFC), HTML entities are decoded, and control characters are removed. Wrongly decoded text (mojibake) is not repaired.
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


def clip_words(caption: str, literal: re.Pattern[str] | None = None, html_unescape: bool = True) -> list[str]:
    """Returns the words of a caption as CLIP splits it: normalised, lower case, one word per digit.

    Args:
        caption: any text.
        literal: pattern, with one group, of texts that are tokens by themselves and are split off first.
        html_unescape: whether HTML entities are decoded as in CLIP's ``basic_clean``: once by ``ftfy.fix_text`` if the
            caption has no "<", and twice by ``html.unescape``.
    """
    if html_unescape:
        caption = caption if "<" in caption else html.unescape(caption)
        text = html.unescape(html.unescape(_normalise(caption)))
    else:
        text = _normalise(caption)
    text = " ".join(text.split()).lower()
    find = _clip_pattern().findall
    if literal is None:
        return find(text)
    parts = literal.split(text)  # text, literal, text, ...
    return [word for place, part in enumerate(parts) for word in ([part] if place % 2 else find(part))]


def glide_words(caption: str) -> list[str]:
    """Returns the words of a caption as GLIDE splits it: lower case, each word with the preceding space."""
    return _glide_pattern().findall(_join_surrogates(caption).lower())


def _join_surrogates(text: str) -> str:
    """Joins surrogate pairs; single surrogates, which cannot be encoded, become U+FFFD."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _normalise(text: str) -> str:
    text = _join_surrogates(text.translate(_table()))
    return unicodedata.normalize("NFC", _REMOVED.sub("", text))


@functools.cache
def _table() -> dict[int, str]:
    """Returns the replacement of each character that is normalised."""
    quotes = dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
    plain = {letter: unicodedata.normalize("NFKC", letter) for letter in _LIGATURES} | {"ﬅ": "ſt"}
    plain |= {chr(code): unicodedata.normalize("NFKC", chr(code)) for code in (0x3000, *range(0xFF01, 0xFFF0))}
    # Latin-1 control characters that are printable in Windows-1252
    signs = {chr(code): bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)}
    replacements = plain | signs | quotes
    return {ord(old): "".join(quotes.get(letter, letter) for letter in new) for old, new in replacements.items()}


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

    Python's ``\w`` matches letters, numbers of the categories Nd, Nl and No, and the underscore; ``\d`` matches Nd.
    Therefore only the numbers of Nl and No must be listed. ``\s`` also matches four separators (U+001C to U+001F) that
    do not count as space here.
    """
    everything = map(chr, range(sys.maxunicode + 1))
    numbers = "".join(one for one in everything if unicodedata.category(one) in ("Nl", "No"))
    return rf"[^\W\d_{numbers}]", rf"[\d{numbers}]", r"[^\S\x1c-\x1f]", r"(?:[^\w\s]|[_\x1c-\x1f])"
