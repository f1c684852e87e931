"""An endless, shuffled, resumable stream of batches from a source.

The order of examples, their captions, crops and degradations are functions of (seed, position in the stream) alone.
The position is the only state of the stream (``{"global_next_index": n}``, the same on every process), so a run resumes
bit for bit, also on another number of processes or with another batch size.

Each pass over the source has its own order; in a mixture, each pass over a part. A batch is prepared by a host thread
while the previous one is in use; ``num_workers`` moves that to other processes, for images that are slow to decode.
"""

import contextlib
import functools
import gc
import os
import queue
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

import cv2
import grain
import numpy as np
from absl import flags

from dalle2_jax import signals
from dalle2_jax.data.sources import DESCRIPTIVE, Source
from dalle2_jax.errors import UserError
from dalle2_jax.types import Batch

_BATCHES_AHEAD = 4
_POSITION = "global_next_index"
_QUIET = "ignore:resource_tracker:UserWarning"
"""Silences the warning about batches that a stopped worker leaves in shared memory: Python frees them."""

_CLOSING, _MOVING = 2.0, 60.0
"""Seconds that worker processes get to end by themselves: at the end, and when the stream moves to another position."""


def _with_state(index: int, rng: np.random.Generator) -> tuple[int, Mapping[str, Any]]:
    """Returns an index and the state of its generator, which grain uses again for the next position."""
    return index, rng.bit_generator.state


@dataclass(frozen=True)
class _Fetch:
    """Makes a batch of indices and the states of their generators; a class, so that workers can unpickle it."""

    source: Source

    def __call__(self, sampled: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, np.ndarray]:
        return self.source.fetch([index for index, _ in sampled], _generators([state for _, state in sampled]))


def _generators(states: Sequence[Mapping[str, Any]]) -> list[np.random.Generator]:
    """Returns a generator in each state. This thread's next batch uses them again, since making one is slow."""
    pool = vars(_threads).setdefault("generators", [])
    while len(pool) < len(states):
        pool.append(np.random.Generator(np.random.Philox(0)))
    for generator, state in zip(pool, states, strict=False):
        generator.bit_generator.state = state
    return pool[: len(states)]


_threads = threading.local()


class _WorkerIterator:
    """An iterator that has worker processes, driven by a thread of its own in which SIGINT and SIGTERM are blocked.

    Threads and processes inherit that mask, so a signal to the whole process group (Ctrl-C) leaves the workers alone
    from their first moment, and the caller's main thread waits for a batch in a place where a signal handler can run.

    Args:
        make: makes the iterator.
    """

    def __init__(self, make: Callable[[], grain.DatasetIterator]) -> None:
        self._make = make
        self._ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(1)
        self._stop = threading.Event()
        self._others = signals.worker_processes()
        self._thread = threading.Thread(target=self._run, daemon=True, name="batches")
        gc.collect()  # semaphores of earlier workers cannot be freed while the tracker holds its lock
        resource_tracker.ensure_running()  # it unblocks the signals where it is first started
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def __next__(self) -> Any:
        batch, error = self._ready.get()
        if error is not None:
            self._ready.put((batch, error))  # the next call raises it too
            raise error
        return batch

    def _run(self) -> None:
        iterator = None
        try:
            iterator = self._make()
            while not self._stop.is_set():
                self._put(next(iterator), None)
        except Exception as error:  # noqa: BLE001  raised where the batch is requested
            self._put(None, error)
        finally:
            with contextlib.suppress(Exception):  # grain's own, for a worker that was killed while it started
                if iterator is not None:
                    iterator.close()

    def _put(self, batch: Any, error: Exception | None) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put((batch, error), timeout=0.1)
                return
            except queue.Full:
                continue

    def close(self, seconds: float = _CLOSING) -> None:
        """Ends the worker processes; kills those that do not end by themselves within ``seconds``."""
        self._stop.set()
        self._thread.join(seconds)
        if self._thread.is_alive():
            signals.kill(signals.worker_processes() - self._others)
            self._thread.join(_CLOSING)  # not for ever: it may read what a killed worker half wrote


class Batches:
    """An endless iterator over batches with a position in the stream, as `make_stream` returns it.

    Args:
        start: makes the iterator over the batches from a position on.
        batch_size: examples of a batch, of all processes.
    """

    def __init__(self, start: Callable[[int], grain.DatasetIterator | _WorkerIterator], batch_size: int) -> None:
        self._start, self._batch_size, self._position = start, batch_size, 0
        self._iterator: grain.DatasetIterator | _WorkerIterator | None = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
            UserError: the source can no longer be read, or a worker process has died.
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
                f"a worker process that prepares batches died (exit code {code and code[1]}), perhaps out of memory: "
                "lower config.workers and run the same command, which continues"
            ) from None
        self._position += self._batch_size
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns the position after the last batch, the same on every process."""
        return {_POSITION: self._position}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Moves to a position that ``get_state`` of this or an equal stream returned."""
        if isinstance(self._iterator, _WorkerIterator):
            self._iterator.close(_MOVING)
        self.close()
        self._position = state[_POSITION]

    def close(self) -> None:
        """Ends the threads and processes that prepare batches, until the next batch is requested."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def make_stream(
    source: Source,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 1,
    num_workers: int = 0,
) -> Batches:
    """Returns an endless iterator over the batches of a source, of all its columns but the descriptive ones.

    Args:
        source: the data set, with the columns that a stage reads (`prepare`, `Source.select`).
        batch_size: of all processes together; each gets b = batch_size / process_count rows of every batch, and row r
            of the global batch goes to process r mod process_count.
        seed: of the order of examples, and of their captions, crops and degradations.
        process_index: number of this process.
        process_count: number of processes.
        num_threads: threads that prepare batches ahead; 0 prepares each batch when it is requested.
        num_workers: processes that prepare batches ahead; 0 for none. They are spawned, so the caller's main module
            must be guarded by ``if __name__ == "__main__"``.

    Raises:
        UserError: ``batch_size`` is not a positive multiple of ``process_count``, ``seed`` does not fit in 32 bits,
            ``num_workers`` is negative, or the source is empty.
    """
    _check(source, batch_size, seed, process_count, num_workers)
    source = source.select(batch_columns(source))
    examples = source.order(seed).random_map(_with_state)
    cv2.setNumThreads(0)  # batches are prepared in parallel, and cv2's own threads would compete with that
    reading = grain.ReadOptions(num_threads, _BATCHES_AHEAD if num_threads else 0)
    if num_workers:
        _prepare_for_workers()
    workers = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=_BATCHES_AHEAD)
    init = functools.partial(_set_up_worker, os.getpid())

    def start(position: int) -> grain.DatasetIterator | _WorkerIterator:
        rows = examples[position + process_index :: process_count]
        batches = rows.batch(batch_size // process_count, drop_remainder=True, batch_fn=_Fetch(source))
        stream = batches.to_iter_dataset(reading)
        return _WorkerIterator(lambda: iter(stream.mp_prefetch(workers, init))) if num_workers else iter(stream)

    return Batches(start, batch_size)


def batch_columns(source: Source) -> list[str]:
    """Returns the columns of a source that are part of a training batch."""
    return [name for name in source.columns if name not in DESCRIPTIVE]


def _check(source: Source, batch_size: int, seed: int, process_count: int, num_workers: int) -> None:
    if num_workers < 0:
        raise UserError(f"workers must be 0 or more, got {num_workers}")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size {batch_size} is not a positive multiple of the {process_count} processes")
    if not 0 <= seed < 2**32:
        raise UserError(f"the seed of a stream must be from 0 to 2**32 - 1, got {seed}")
    if len(source) == 0:
        raise UserError(f"{source} has no examples")


def _prepare_for_workers() -> None:
    if not flags.FLAGS.is_parsed():  # grain's workers copy absl's flags and need them parsed
        flags.FLAGS(sys.argv[:1])
    if _QUIET not in sys.warnoptions:
        sys.warnoptions.append(_QUIET)


def _set_up_worker(parent: int, worker: int, workers: int) -> None:
    """Ignores SIGINT and SIGTERM in a worker: the parent process shuts it down. It exits by itself without a parent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signals.end_with(parent)


def fixed_batch(source: Source, indices: Sequence[int], inputs: Sequence[str] | None = None) -> tuple[Batch, list[str]]:
    """Returns a batch of given examples and their captions, always the same: for evaluations and previews.

    Args:
        source: the data set, with tokens and degraded images if the batch needs them (`prepare`).
        indices: of the examples, each in its fixed form (see `Source.fetch`).
        inputs: the columns of the batch; None for all but the descriptive ones.

    Raises:
        MissingColumnsError: the source does not have one of the columns.
    """
    names = batch_columns(source) if inputs is None else list(inputs)
    columns = source.select([*names, "caption"]).fetch(indices)
    return Batch(**{name: columns[name] for name in names}), columns["caption"].tolist()
