"""Text in, tokens out: ``str -> int32[B, L]``."""

from pathlib import Path

from dalle2_jax.text import sentencepiece as _sentencepiece
from dalle2_jax.text.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from dalle2_jax.text.storage import read_description
from dalle2_jax.text.tokenizer import Tokenizer
from dalle2_jax.types import UserError

__all__ = ["SentencePieceTokenizer", "Tokenizer", "load_tokenizer", "train_sentencepiece"]

_KINDS = {_sentencepiece.KIND: SentencePieceTokenizer}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads the tokenizer that was saved in a folder, or a sentencepiece ``.model`` file.

    Raises:
        UserError: when it is missing, damaged or of a kind this version does not know.
    """
    path = Path(path)
    kind, file = (_sentencepiece.KIND, path) if path.suffix == ".model" else read_description(path)
    if kind not in _KINDS:
        raise UserError(f"{path} holds a tokenizer of unknown kind {kind!r}: known are {', '.join(_KINDS)}")
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no tokenizer at {file}") from None
    try:
        return _KINDS[kind](content)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
