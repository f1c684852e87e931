import multiprocessing
import os
import pathlib
import pickle
import signal
import time
from multiprocessing import util

import numpy as np
import pytest
from raised import mentions
from streams import text_stream

from dalle2_jax import signals
from dalle2_jax.data import ShapesSource, Source, example, fixed_batch, prepare
from dalle2_jax.data.sources import objects
from dalle2_jax.errors import UserError
from dalle2_jax.text import train_sentencepiece

SOURCE = ShapesSource("train", 16, max_objects=2, num_examples=40)


@pytest.fixture(scope="module")
def tokenizer():
    return train_sentencepiece(SOURCE.captions(40), 320)


def _take(stream, count):
    return [next(stream) for _ in range(count)]


def _equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys() == {"image", "tokens", "mask"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


class Numbers(Source):
    """A source whose images hold their own index, which shows the examples that a stream visits."""

    columns = ("image", "caption")

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def fetch(self, indices, rngs=None):
        images = np.array(indices, np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)
        columns = {"image": images, "caption": objects([str(rng.integers(10**6)) for rng in rngs])}
        return {name: columns[name] for name in self.columns}

    def captions(self, limit):
        return iter(())


def _numbers(batches):
    return [int(number) for batch in batches for number in batch["image"][:, 0, 0, 0]]


def test_batches_have_the_documented_shapes_and_dtypes(tokenizer):
    batch = next(text_stream(SOURCE, tokenizer, 24, 8, seed=0))
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "image": ((8, 16, 16, 3), "uint8"),
        "tokens": ((8, 24), "int32"),
        "mask": ((8, 24), "bool"),
    }


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_resumed_stream_continues_bit_for_bit(tokenizer, num_threads):
    make = lambda: text_stream(SOURCE, tokenizer, 24, 8, seed=3, num_threads=num_threads)  # noqa: E731
    uninterrupted = _take(make(), 12)  # crosses the end of the second epoch
    stream = make()
    _take(stream, 7)
    state = pickle.loads(pickle.dumps(stream.get_state()))
    assert state == {"global_next_index": 56}
    resumed = make()
    resumed.set_state(state)
    _equal(_take(resumed, 5), uninterrupted[7:])
    stream.set_state({"global_next_index": 0})
    _equal(_take(stream, 3), uninterrupted[:3])


def test_each_epoch_visits_every_example_once_in_its_own_order(tokenizer):
    visited = _numbers(_take(text_stream(Numbers(24), tokenizer, 8, 6, seed=1), 8))
    first, second = visited[:24], visited[24:]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second and first != list(range(24))
    assert visited != _numbers(_take(text_stream(Numbers(24), tokenizer, 8, 6, seed=2), 8))


def test_a_batch_may_be_larger_than_the_source(tokenizer):
    assert sorted(_numbers([next(text_stream(Numbers(4), tokenizer, 8, 8, seed=1))])) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_captions_are_resampled_every_epoch(tokenizer):
    stream = text_stream(ShapesSource("train", 8, num_examples=1), tokenizer, 24, 16, seed=0)
    assert len(np.unique(next(stream)["tokens"], axis=0)) > 4


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(tokenizer, count):
    uninterrupted = _take(text_stream(SOURCE, tokenizer, 24, 8, seed=5), 6)
    parts = [text_stream(SOURCE, tokenizer, 24, 8, 5, process, count) for process in range(count)]
    for batch in uninterrupted[:3]:
        shares = [next(part) for part in parts]
        for name in batch:
            joined = np.stack([share[name] for share in shares], axis=1).reshape(batch[name].shape)
            np.testing.assert_array_equal(joined, batch[name])
    states = [part.get_state() for part in parts]
    assert states == [states[0]] * count
    alone = text_stream(SOURCE, tokenizer, 24, 8, seed=5)  # the run resumes on one process
    alone.set_state(states[0])
    _equal(_take(alone, 3), uninterrupted[3:])


def test_worker_processes_give_the_same_stream(tokenizer):
    uninterrupted = _take(text_stream(SOURCE, tokenizer, 24, 8, seed=5), 5)
    stream = text_stream(SOURCE, tokenizer, 24, 8, seed=5, num_workers=1)
    stream.set_state({"global_next_index": 16})
    _equal(_take(stream, 1), uninterrupted[2:3])
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)  # Ctrl-C sends SIGINT to every process; only the parent handles it
    _equal(_take(stream, 2), uninterrupted[3:])
    assert stream.get_state() == {"global_next_index": 40}
    stream.close()


def test_a_worker_that_is_killed_is_reported_in_one_line(tokenizer):
    stream = text_stream(SOURCE, tokenizer, 24, 8, seed=5, num_workers=1)
    next(stream)
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(UserError, check=mentions("worker process", -9, "config.workers")):
        for _ in range(100):
            next(stream)
    stream.close()


def test_unexpected_exceptions_are_raised_with_their_traceback(tokenizer):
    class Failing(Numbers):
        def fetch(self, indices, rngs=None):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        next(text_stream(Failing(3), tokenizer, 24, 2, seed=0))


def test_fixed_batches_are_identical_each_time(tokenizer):
    batch, captions = fixed_batch(prepare(SOURCE, tokenizer, 24), [3, 1])
    assert captions == [SOURCE.caption(3), SOURCE.caption(1)]
    np.testing.assert_array_equal(batch["image"][0], example(SOURCE, 3)["image"])
    np.testing.assert_array_equal(batch["tokens"], tokenizer.encode(captions, 24)[0])
    _equal([batch], [fixed_batch(prepare(SOURCE, tokenizer, 24), [3, 1])[0]])


def test_invalid_arguments_raise_user_errors(tokenizer):
    with pytest.raises(UserError, check=mentions("batch_size 9", "2 processes")):
        text_stream(SOURCE, tokenizer, 24, 9, 0, process_count=2)
    with pytest.raises(UserError, check=mentions("batch_size 0")):
        text_stream(SOURCE, tokenizer, 24, 0, 0)
    for seed in (-1, 2**32):
        with pytest.raises(UserError, check=mentions("seed", seed)):
            text_stream(SOURCE, tokenizer, 24, 8, seed)
    with pytest.raises(UserError, check=mentions("workers", -1)):
        text_stream(SOURCE, tokenizer, 24, 8, 0, num_workers=-1)
    with pytest.raises(UserError, check=mentions("Numbers", "no examples")):
        text_stream(Numbers(0), tokenizer, 24, 8, 0)


def blocked(process):
    """Returns which of SIGINT and SIGTERM a process blocks or ignores."""
    lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    mask = int(status["SigBlk"], 16) | int(status["SigIgn"], 16)
    return {number for number in (signal.SIGINT, signal.SIGTERM) if mask >> (number - 1) & 1}


def test_workers_ignore_signals_during_startup_and_are_terminated_afterwards(tokenizer, capfd):
    """A Ctrl-C during their imports reaches every process of the group; the parent must not wait forever."""
    before, finalizers = signals.worker_processes(), {*util._finalizer_registry}
    stream = text_stream(SOURCE, tokenizer, 24, 8, seed=5, num_workers=2)
    stream._iterator = stream._start(0)  # starts the workers as the first batch does, without waiting for a batch
    deadline = time.monotonic() + 30
    while len(workers := signals.worker_processes() - before) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(workers) == 2 and [blocked(worker) for worker in workers] == [{signal.SIGINT, signal.SIGTERM}] * 2
    start = time.monotonic()
    stream.close()
    assert time.monotonic() - start < 8 and not signals.worker_processes() - before
    assert capfd.readouterr().err == ""
    for key in {*util._finalizer_registry} - finalizers:  # of killed processes; they would run at exit
        util._finalizer_registry.pop(key, None)
