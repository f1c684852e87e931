import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest

from dalle2_jax.data import ShapesSource, fixed_batch, make_stream
from dalle2_jax.text import train_sentencepiece
from dalle2_jax.types import UserError

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


class Numbers:
    """A source whose pictures show their own number, to see what a stream visits."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def draw(self, index, rng):
        return self[index]["image"], str(rng.integers(10**6))

    def __getitem__(self, index):
        return {"image": np.full((1, 1, 3), index, np.uint8), "captions": ("",), "caption": ""}

    def captions(self, limit):
        return iter(())


def _numbers(batches):
    return [int(number) for batch in batches for number in batch["image"][:, 0, 0, 0]]


def test_batches_have_the_shapes_and_types_of_the_seam(tokenizer):
    batch = next(make_stream(SOURCE, tokenizer, 24, 8, seed=0))
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "image": ((8, 16, 16, 3), "uint8"),
        "tokens": ((8, 24), "int32"),
        "mask": ((8, 24), "bool"),
    }


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_resumed_stream_continues_bit_for_bit(tokenizer, num_threads):
    make = lambda: make_stream(SOURCE, tokenizer, 24, 8, seed=3, num_threads=num_threads)  # noqa: E731
    whole = _take(make(), 12)  # over the end of the second pass
    stream = make()
    _take(stream, 7)
    state = pickle.loads(pickle.dumps(stream.get_state()))
    assert state == {"global_next_index": 56}
    resumed = make()
    resumed.set_state(state)
    _equal(_take(resumed, 5), whole[7:])
    stream.set_state({"global_next_index": 0})
    _equal(_take(stream, 3), whole[:3])


def test_each_pass_visits_everything_once_in_its_own_order(tokenizer):
    visited = _numbers(_take(make_stream(Numbers(24), tokenizer, 8, 6, seed=1), 8))
    first, second = visited[:24], visited[24:]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second and first != list(range(24))
    assert visited != _numbers(_take(make_stream(Numbers(24), tokenizer, 8, 6, seed=2), 8))


def test_a_batch_may_be_larger_than_the_source(tokenizer):
    assert sorted(_numbers([next(make_stream(Numbers(4), tokenizer, 8, 8, seed=1))])) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_captions_are_drawn_anew_each_pass(tokenizer):
    stream = make_stream(ShapesSource("train", 8, num_examples=1), tokenizer, 24, 16, seed=0)
    assert len(np.unique(next(stream)["tokens"], axis=0)) > 4


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(tokenizer, count):
    whole = _take(make_stream(SOURCE, tokenizer, 24, 8, seed=5), 6)
    parts = [make_stream(SOURCE, tokenizer, 24, 8, 5, process, count) for process in range(count)]
    for batch in whole[:3]:
        shares = [next(part) for part in parts]
        for name in batch:
            joined = np.stack([share[name] for share in shares], axis=1).reshape(batch[name].shape)
            np.testing.assert_array_equal(joined, batch[name])
    states = [part.get_state() for part in parts]
    assert states == [states[0]] * count
    alone = make_stream(SOURCE, tokenizer, 24, 8, seed=5)  # the run goes on, on one process
    alone.set_state(states[0])
    _equal(_take(alone, 3), whole[3:])


def test_worker_processes_give_the_same_stream(tokenizer):
    whole = _take(make_stream(SOURCE, tokenizer, 24, 8, seed=5), 5)
    stream = make_stream(SOURCE, tokenizer, 24, 8, seed=5, num_workers=1)
    stream.set_state({"global_next_index": 16})
    _equal(_take(stream, 1), whole[2:3])
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)  # which a user's Ctrl-C sends to all, and the main process answers
    _equal(_take(stream, 2), whole[3:])
    assert stream.get_state() == {"global_next_index": 40}
    stream.close()


def test_a_worker_that_is_killed_is_said_in_one_line(tokenizer):
    stream = make_stream(SOURCE, tokenizer, 24, 8, seed=5, num_workers=1)
    next(stream)
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(UserError, match=r"was ended .exit code -9.*lower config.workers") as told:
        for _ in range(100):
            next(stream)
    assert "\n" not in str(told.value)
    stream.close()


def test_other_failures_keep_their_traceback(tokenizer):
    class Failing(Numbers):
        def draw(self, index, rng):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        next(make_stream(Failing(3), tokenizer, 24, 2, seed=0))


def test_fixed_batches_are_fixed(tokenizer):
    batch, captions = fixed_batch(SOURCE, tokenizer, 24, [3, 1])
    assert captions == [SOURCE.caption(3), SOURCE.caption(1)]
    np.testing.assert_array_equal(batch["image"][0], SOURCE[3]["image"])
    np.testing.assert_array_equal(batch["tokens"], tokenizer.encode(captions, 24)[0])
    _equal([batch], [fixed_batch(SOURCE, tokenizer, 24, [3, 1])[0]])


def test_mistakes_are_answered(tokenizer):
    with pytest.raises(UserError, match="batch_size 9 .* 2 processes"):
        make_stream(SOURCE, tokenizer, 24, 9, 0, process_count=2)
    with pytest.raises(UserError, match="batch_size 0"):
        make_stream(SOURCE, tokenizer, 24, 0, 0)
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match="seed of a stream"):
            make_stream(SOURCE, tokenizer, 24, 8, seed)
    with pytest.raises(UserError, match="workers must be 0 or more, not -1"):
        make_stream(SOURCE, tokenizer, 24, 8, 0, num_workers=-1)
    with pytest.raises(UserError, match="no examples"):
        make_stream(Numbers(0), tokenizer, 24, 8, 0)
