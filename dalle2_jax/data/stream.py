"""An endless, shuffled, resumable stream of batches from a source.

The order of examples, their captions, crops and degradations are functions of (seed, position in the stream)
alone. Position is the stream's whole state (``{"global_next_index": n}``, the same on every process), so a
run resumes bit for bit, on another number of processes or with another batch size too.

Each pass over the source has its own order; of a mixture, each pass over a part. A batch is drawn, tokenized and
stacked on a host thread while the previous one is in use; ``num_workers`` moves that into other processes for sources
slow to decode.
"""

import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import grain
import numpy as np
from absl import flags

from dalle2_jax.data import degradation
from dalle2_jax.data.embeddings import Embedded
from dalle2_jax.data.mixture import MixtureSource
from dalle2_jax.data.sources import Source
from dalle2_jax.text import Tokenizer
from dalle2_jax.types import Batch, Degrading, UserError

_BATCHES_AHEAD = 4
_POSITION = "global_next_index"
_QUIET = "ignore:resource_tracker:UserWarning"
"""A worker that is stopped leaves batches in shared memory: Python clears them, and need not say so."""

_WORDS = ("key", "stands_in", "captions", "caption")  # of an example, no rows of a batch


@dataclass(frozen=True)
class _Prepare:
    """Index to example; a class and not a closure, so that it can be pickled for worker processes."""

    source: Source
    tokenizer: Tokenizer | None
    context_length: int
    degrading: Degrading | None

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        drawn, caption = self.source.draw(index, rng)
        if isinstance(drawn, dict):  # of a `PairedSource`
            rows = dict(drawn)
        else:
            rows = degradation.pair(drawn, self.degrading, rng) if self.degrading else {"image": drawn}
        if self.tokenizer is not None and "tokens" not in rows:
            tokens, mask = self.tokenizer.encode([caption], self.context_length)
            rows |= {"tokens": tokens[0], "mask": mask[0]}
        return rows


@dataclass(frozen=True)
class _Choose:
    """Index to itself and the number of a caption."""

    source: Embedded

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[int, int]:
        return index, self.source.choose(index, rng)


@dataclass(frozen=True)
class _Gather:
    """Chosen examples to a batch."""

    source: Embedded
    tokenizer: Tokenizer | None
    context_length: int

    def __call__(self, chosen: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        rows, captions = self.source.gather(*np.array(chosen, np.int64).T)
        if self.tokenizer is not None and "tokens" not in rows:
            rows["tokens"], rows["mask"] = self.tokenizer.encode(captions, self.context_length)
        return rows


class Batches:
    """An endless iterator over batches, with its place in the stream; what `make_stream` returns.

    Args:
        start: makes the iterator over the batches from a position on.
        batch_size: examples of a batch, of all processes.
    """

    def __init__(self, start: Callable[[int], grain.DatasetIterator], batch_size: int) -> None:
        self._start, self._batch_size, self._position = start, batch_size, 0
        self._iterator: grain.DatasetIterator | None = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
            UserError: the source cannot be read any more, or a worker process has died.
        """
        if self._iterator is None:
            self._iterator = self._start(self._position)
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            code = re.search(r"exit code (-?\d+)", str(error))
            raise UserError(
                f"a process that prepared batches was ended (exit code {code and code[1]}), as for want of memory: "
                "lower config.workers, and the same command continues"
            ) from None
        self._position += self._batch_size
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns the position after the last batch, the same on every process."""
        return {_POSITION: self._position}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes to a position that ``get_state`` returned, of this or an equal stream."""
        self.close()
        self._position = state[_POSITION]

    def close(self) -> None:
        """Ends the threads and processes that prepare batches, until the next is asked for."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


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
    degrading: Degrading | None = None,
) -> Batches:
    """Returns an iterator over `Batch`: image uint8[b, H, W, 3], tokens int32[b, L], mask bool[b, L].

    In place of pictures an `Embedded` source gives what CLIP said of them, and tokens where it has them.

    Args:
        tokenizer: None for a stage that reads no text; its batches have the pictures alone.
        batch_size: of all processes together; each gets b = batch_size / process_count rows of every batch,
            row r of the global batch going to process r mod process_count.
        num_threads: threads that prepare batches ahead; 0 prepares each batch when it is asked for.
        num_workers: processes that prepare batches ahead; 0 for none. They are spawned, so the caller's main
            module must be guarded by ``if __name__ == "__main__"``.
        degrading: of an upsampler; image is then a crop, uint8[b, s, s, 3], and low_res uint8[b, s / f, s / f, 3].

    Raises:
        UserError: when ``batch_size`` is not a positive multiple of ``process_count``, ``seed`` is not a 32-bit
            number from 0, ``num_workers`` is less, the source is empty, or its pictures are not of the size that
            ``degrading`` is of.
    """
    _check(source, batch_size, seed, process_count, num_workers)
    if degrading:
        _check_size(source, degrading)
    if isinstance(source, MixtureSource):
        order = source.order(seed)
    else:
        order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    if hasattr(source, "gather"):  # a batch at once, which an `Embedded` source does sooner than one by one
        examples = order.random_map(_Choose(source))
        stack = _Gather(source, tokenizer, context_length)
    else:
        examples = order.random_map(_Prepare(source, tokenizer, context_length, degrading))
        stack = None
    cv2.setNumThreads(0)  # parallelism is over batches; cv2's own threads would fight with it
    reading = grain.ReadOptions(num_threads, _BATCHES_AHEAD if num_threads else 0)
    if num_workers:
        _make_ready_for_workers()
    workers = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=_BATCHES_AHEAD)

    def start(position: int) -> grain.DatasetIterator:
        rows = examples[position + process_index :: process_count]
        batches = rows.batch(batch_size // process_count, drop_remainder=True, batch_fn=stack)
        stream = batches.to_iter_dataset(reading)
        return iter(stream.mp_prefetch(workers, _await_orders) if num_workers else stream)

    return Batches(start, batch_size)


def _check(source: Source, batch_size: int, seed: int, process_count: int, num_workers: int) -> None:
    if num_workers < 0:
        raise UserError(f"workers must be 0 or more, not {num_workers}")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size {batch_size} is not a positive multiple of the {process_count} processes")
    if not 0 <= seed < 2**32:
        raise UserError(f"the seed of a stream must be from 0 to 2**32 - 1, not {seed}")
    if len(source) == 0:
        raise UserError(f"{source} has no examples")


def _make_ready_for_workers() -> None:
    if not flags.FLAGS.is_parsed():  # grain's workers copy absl's flags and need them parsed
        flags.FLAGS(sys.argv[:1])
    if _QUIET not in sys.warnoptions:
        sys.warnoptions.append(_QUIET)


def _await_orders(worker: int, workers: int) -> None:
    """Leaves it to the process that started this one when both end, also when a user interrupts them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check_size(source: Source, degrading: Degrading) -> None:
    side, wanted = source[0]["image"].shape[0], degrading.image_size
    if side != wanted:
        raise UserError(
            f"degradation {degrading.name!r} cuts crops from pictures of {wanted} pixels, "
            f"and the data's have {side}: set config.data.resolution={wanted}"
        )


def fixed_batch(
    source: Source,
    tokenizer: Tokenizer | None,
    context_length: int,
    indices: Sequence[int],
    degrading: Degrading | None = None,
) -> tuple[Batch, list[str]]:
    """Returns the batch of given examples and their captions, always the same: for evaluations and previews.

    Each example has its fixed picture (a centre crop) and its fixed caption, ``source[i]["caption"]``. With
    ``degrading`` it has a crop of that picture, and its ``low_res``, that depend on its index alone.

    Raises:
        UserError: when the source's pictures are not of the size that ``degrading`` is of.
    """
    examples = [source[index] for index in indices]
    captions = [example["caption"] for example in examples]
    rows = [{name: value for name, value in example.items() if name not in _WORDS} for example in examples]
    if degrading:
        _check_size(source, degrading)
        rows = [
            degradation.pair(row["image"], degrading, np.random.default_rng(index))
            for index, row in zip(indices, rows, strict=True)
        ]
    batch = Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})
    if tokenizer is not None and "tokens" not in batch:
        batch["tokens"], batch["mask"] = tokenizer.encode(captions, context_length)
    return batch, captions
