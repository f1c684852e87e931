"""An endless, shuffled, resumable stream of batches from a source.

The order of examples, their captions and their crops are functions of (seed, position in the stream)
alone. Position is the stream's whole state (``{"global_next_index": n}``, the same on every process), so a
run resumes bit for bit, on another number of processes or with another batch size too.

Each pass over the source has its own order; of a mixture, each pass over a part. A batch is drawn, tokenized and
stacked on a host thread while the previous one is in use; ``num_workers`` moves that into other processes for sources
slow to decode.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import grain
import numpy as np
from absl import flags

from dalle2_jax.data.embeddings import Embedded
from dalle2_jax.data.mixture import MixtureSource
from dalle2_jax.data.sources import Source
from dalle2_jax.text import Tokenizer
from dalle2_jax.types import Batch, UserError

_BATCHES_AHEAD = 4
_WORDS = ("key", "stands_in", "captions", "caption")  # of an example, no rows of a batch


@dataclass(frozen=True)
class _Prepare:
    """Index to example; a class and not a closure, so that it can be pickled for worker processes."""

    source: Source
    tokenizer: Tokenizer | None
    context_length: int

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        drawn, caption = self.source.draw(index, rng)
        rows = dict(drawn) if isinstance(self.source, Embedded) else {"image": drawn}
        if self.tokenizer is not None and "tokens" not in rows:
            tokens, mask = self.tokenizer.encode([caption], self.context_length)
            rows |= {"tokens": tokens[0], "mask": mask[0]}
        return rows


def make_stream(
    source: Source,
    tokenizer: Tokenizer | None,
    context_length: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 1,
    num_workers: int = 0,
) -> grain.DatasetIterator:
    """Returns an iterator over `Batch`: image uint8[b, H, W, 3], tokens int32[b, L], mask bool[b, L].

    In place of pictures an `Embedded` source gives what CLIP said of them, and tokens where it has them.

    Besides ``next`` it has ``get_state()``, ``set_state(state)`` and ``close()``.

    Args:
        tokenizer: None for a stage that reads no text; its batches have the pictures alone.
        batch_size: of all processes together; each gets b = batch_size / process_count rows of every batch,
            row r of the global batch going to process r mod process_count.
        num_threads: threads that prepare batches ahead; 0 prepares each batch when it is asked for.
        num_workers: processes that prepare batches ahead; 0 for none. They are spawned, so the caller's main
            module must be guarded by ``if __name__ == "__main__"``.

    Raises:
        UserError: when ``batch_size`` is not a positive multiple of ``process_count``, ``seed`` is not a 32-bit
            number from 0, or the source is empty.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size {batch_size} is not a positive multiple of the {process_count} processes")
    if not 0 <= seed < 2**32:
        raise UserError(f"the seed of a stream must be from 0 to 2**32 - 1, not {seed}")
    if len(source) == 0:
        raise UserError(f"{source} has no examples")
    if isinstance(source, MixtureSource):
        order = source.order(seed)
    else:
        order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    examples = order.random_map(_Prepare(source, tokenizer, context_length))
    cv2.setNumThreads(0)  # parallelism is over batches; cv2's own threads would fight with it
    workers = None
    if num_workers:
        if not flags.FLAGS.is_parsed():  # grain's workers copy absl's flags and need them parsed
            flags.FLAGS(sys.argv[:1])
        workers = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=_BATCHES_AHEAD)
    return iter(
        grain.experimental.ElasticIterator(
            examples,
            batch_size,
            grain.sharding.ShardOptions(process_index, process_count, drop_remainder=True),
            read_options=grain.ReadOptions(num_threads, _BATCHES_AHEAD if num_threads else 0),
            multiprocessing_options=workers,
        )
    )


def fixed_batch(
    source: Source, tokenizer: Tokenizer | None, context_length: int, indices: Sequence[int]
) -> tuple[Batch, list[str]]:
    """Returns the batch of given examples and their captions, always the same: for evaluations and previews.

    Each example has its fixed picture (a centre crop) and its fixed caption, ``source[i]["caption"]``.
    """
    examples = [source[index] for index in indices]
    captions = [example["caption"] for example in examples]
    batch = Batch(
        {name: np.stack([example[name] for example in examples]) for name in examples[0] if name not in _WORDS}
    )
    if tokenizer is not None and "tokens" not in batch:
        batch["tokens"], batch["mask"] = tokenizer.encode(captions, context_length)
    return batch, captions
