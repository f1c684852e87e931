"""Tokenizers: captions to token ids, ``str -> int32[B, L]``."""

from pathlib import Path

from dalle2_jax.errors import UserError
from dalle2_jax.text import byte_pair as _byte_pair
from dalle2_jax.text import labels as _labels
from dalle2_jax.text import sentencepiece as _sentencepiece
from dalle2_jax.text.byte_pair import (
    ClipTokenizer,
    GlideTokenizer,
    clip_tokenizer,
    glide_tokenizer,
)
from dalle2_jax.text.folder import read_clip_tokenizer, write_clip_tokenizer
from dalle2_jax.text.labels import LabelTokenizer
from dalle2_jax.text.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from dalle2_jax.text.storage import read_description, read_file
from dalle2_jax.text.tokenizer import Tokenizer

__all__ = [
    "ClipTokenizer",
    "GlideTokenizer",
    "LabelTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "clip_tokenizer",
    "glide_tokenizer",
    "load_tokenizer",
    "read_clip_tokenizer",
    "train_sentencepiece",
    "write_clip_tokenizer",
]

_KINDS = {
    _sentencepiece.KIND: SentencePieceTokenizer,
    _byte_pair.CLIP_KIND: ClipTokenizer.from_bytes,
    _byte_pair.GLIDE_KIND: GlideTokenizer.from_bytes,
    _labels.KIND: LabelTokenizer.from_bytes,
}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads the tokenizer in a folder, or a sentencepiece ``.model`` file.

    Raises:
        UserError: the tokenizer is missing, damaged or of an unknown kind.
    """
    path = Path(path)
    kind, file = (_sentencepiece.KIND, path) if path.suffix == ".model" else read_description(path)
    if kind not in _KINDS:
        raise UserError(f"{path} has a tokenizer of unknown kind {kind!r} (known kinds: {', '.join(_KINDS)})")
    try:
        content = read_file(file)
    except FileNotFoundError:
        raise UserError(f"there is no tokenizer at {file}") from None
    try:
        return _KINDS[kind](content)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
