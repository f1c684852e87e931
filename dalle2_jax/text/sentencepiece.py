"""A sentencepiece tokenizer trained on a data set's own captions.

Byte-pair pieces (Sennrich et al., arXiv 1508.07909) of lower-case text in NFKC form, and one piece for each of the 256
bytes, so that any Unicode text can be encoded. The four control tokens have fixed ids. The unigram model is not used,
because it splits common words of a small corpus into characters: with 333 pieces, the longest two-object caption of
shapes has 48 pieces, against 22 here.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from jaxtyping import Bool, Int32

from dalle2_jax.errors import UserError
from dalle2_jax.files import write_atomically
from dalle2_jax.text.storage import write_description
from dalle2_jax.text.tokenizer import pack

PAD, BOS, EOS, UNK = 0, 1, 2, 3
KIND = "sentencepiece"
_FILE = "tokenizer.model"
_FIXED_PIECES = 4 + 256  # control tokens and bytes
_CACHE_SIZE = 65_536  # captions; shapes has fewer, and larger data sets rarely repeat captions


class SentencePieceTokenizer:
    """A trained sentencepiece model.

    Args:
        model: content of a ``.model`` file.

    Raises:
        UserError: it is not a sentencepiece model with the control tokens of this package.
    """

    def __init__(self, model: bytes) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError("this is not a sentencepiece model, or it is cut short") from None
        control = tuple(getattr(self._processor, name)() for name in ("pad_id", "bos_id", "eos_id", "unk_id"))
        if control != (PAD, BOS, EOS, UNK):
            raise UserError(
                f"the ids of pad, bos, eos and unk must be {(PAD, BOS, EOS, UNK)}, got {control}: "
                "train it with dalle2 text train"
            )
        self._model = model
        self._cache: dict[str, tuple[int, ...]] = {}
        self.vocab_size: int = self._processor.get_piece_size()

    def __repr__(self) -> str:
        return f"SentencePieceTokenizer(vocab_size={self.vocab_size})"

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self._model,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SentencePieceTokenizer) and self._model == other._model

    def __hash__(self) -> int:
        return hash(self._model)

    def to_bytes(self) -> bytes:
        """Returns the content of the ``.model`` file."""
        return self._model

    def save(self, directory: str | Path) -> None:
        """Writes the model and its description to a folder; each file is written atomically."""
        write_atomically(Path(directory) / _FILE, self._model)
        write_description(directory, KIND, _FILE)

    def encode(
        self, captions: Sequence[str], context_length: int
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Returns tokens int32[B, L] (begin, pieces, end, pad) and mask bool[B, L] (false on pad).

        Raises:
            UserError: ``context_length`` is less than 2.
        """
        return pack([self._ids(caption) for caption in captions], context_length, BOS, EOS, PAD)

    def truncated(self, captions: Sequence[str], context_length: int) -> list[int]:
        """Returns the indices of the captions that are truncated at ``context_length``."""
        return [index for index, caption in enumerate(captions) if len(self._ids(caption)) + 2 > context_length]

    def decode(self, tokens: Int32[np.ndarray, "L"]) -> str:
        """Returns the text of a row of tokens, without control tokens."""
        return self._processor.decode([int(token) for token in tokens if token not in (PAD, BOS, EOS)])

    def _ids(self, caption: str) -> tuple[int, ...]:
        ids = self._cache.get(caption)
        if ids is None:
            if len(self._cache) >= _CACHE_SIZE:
                self._cache.clear()
            ids = self._cache[caption] = tuple(self._processor.encode(caption))
        return ids


def train_sentencepiece(captions: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Trains a tokenizer. Equal captions and ``vocab_size`` give equal bytes.

    Args:
        captions: training text.
        vocab_size: number of pieces; a small corpus may give fewer.

    Raises:
        UserError: there is no text, or ``vocab_size`` is too small for the 256 bytes, the 4 control tokens and all
            characters of the captions.
    """
    lines = [line for caption in captions for line in caption.splitlines() if line.strip()]
    if not lines:
        raise UserError("there are no captions to train a tokenizer on")
    if vocab_size <= _FIXED_PIECES:
        raise UserError(f"vocab_size must be greater than 260 (256 bytes, 4 control tokens), got {vocab_size}")
    output = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=output,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"no tokenizer with vocab_size {vocab_size} can be trained on these captions: {_reason(error)}"
        ) from None
    return SentencePieceTokenizer(output.getvalue())


def _reason(error: RuntimeError) -> str:
    """Returns the trainer's message, without the source line and condition at its start."""
    return " ".join(str(error).split("] ")[-1].split()) or "the trainer gave no reason"
