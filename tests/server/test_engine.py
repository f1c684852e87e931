"""The engine over a runner of numbers: batches, progress, cancellation, errors, limits, shutdown."""

import threading

import pytest
from raised import mentions

from dalle2_jax.errors import UsageError
from dalle2_jax.server.engine import Closing, Engine, Finished, Item, QueueFull, Step

TIMEOUT = 10


class Doubler:
    """Splits a list of numbers into items, and doubles each twice; it waits for ``gate`` before each batch."""

    def __init__(self):
        self.batches, self.gate, self.entered = [], threading.Event(), threading.Semaphore(0)
        self.gate.set()

    def run(self, items, size, report):
        self.entered.release()
        assert self.gate.wait(TIMEOUT)
        rank = items[0].step.rank
        self.batches.append((rank, [item.state for item in items], size))
        if rank == 0:
            [item] = items
            return [[Item(Step(("double", 1), 1), value, at) for at, value in enumerate(item.state)]]
        if any(item.state == "broken" for item in items):
            raise ValueError("a broken number")
        if report:
            for number, item in enumerate(items):
                report(number, (rank, item.state))
        if rank == 1:
            return [[Item(Step(("double", 2), 2), item.state * 2, item.position)] for item in items]
        return [[Finished(item.state * 2, item.position)] for item in items]


def numbers(*values):
    return Item(Step(("prepare", values), 0, batched=False), values)


@pytest.fixture
def runner():
    return Doubler()


@pytest.fixture
def engine(runner):
    engine = Engine(runner, sizes=(1, 2, 4), capacity=12)
    engine.start()
    yield engine
    runner.gate.set()
    assert engine.close(TIMEOUT)


def results(ticket):
    return ticket.future.result(TIMEOUT)


def held(engine, runner):
    """Makes the worker wait inside a batch; returns that batch's ticket."""
    runner.gate.clear()
    first = engine.submit("first", numbers(1))
    assert runner.entered.acquire(timeout=TIMEOUT)
    return first


def test_results_are_those_of_each_request_in_order(engine, runner):
    first = held(engine, runner)
    tickets = [engine.submit(owner, numbers(*values), len(values)) for owner, values in (("a", (1, 2, 3)), ("b", (9,)))]
    runner.gate.set()
    assert [results(ticket) for ticket in tickets] == [[4, 8, 12], [36]]
    assert results(first) == [4]
    shared = [batch for batch in runner.batches if batch[0] == 2 and len(batch[1]) > 1]
    assert shared and all(size in (2, 4) for *_, size in shared)  # rows of several requests, padded


def test_progress_reaches_listeners_only(engine, runner):
    first, heard = held(engine, runner), []
    ticket = engine.submit(
        "a", numbers(5, 6), 2, listener=lambda position, progress: heard.append((position, progress))
    )
    runner.gate.set()
    assert results(ticket) == [20, 24] and results(first) == [4]
    assert sorted(heard) == [(0, (1, 5)), (0, (2, 10)), (1, (1, 6)), (1, (2, 12))]


def test_a_cancelled_request_leaves_the_queue_and_its_batches(engine, runner):
    first = held(engine, runner)
    gone, other = engine.submit("a", numbers(7, 7), 2), engine.submit("b", numbers(3))
    gone.cancel()
    assert engine.submit("c", numbers(*[0] * 9), 9)  # its place is free again
    runner.gate.set()
    assert results(first) == [4] and results(other) == [12]
    assert all(7 not in states for _, states, _ in runner.batches)
    assert gone.future.cancelled()


def test_an_error_fails_the_requests_of_its_batch_and_no_other(engine):
    with pytest.raises(ValueError, match="broken"):
        results(engine.submit("a", numbers("broken")))
    assert results(engine.submit("a", numbers(1))) == [4]


def test_a_full_queue_says_when_to_come_back(engine, runner):
    held(engine, runner)
    engine.submit("a", numbers(*range(11)), 11)
    with pytest.raises(QueueFull, check=mentions(12)) as caught:
        engine.submit("b", numbers(1))
    assert caught.value.retry_after >= 1 and engine.waiting == 12


def test_closing_finishes_what_has_started_and_no_more(runner):
    engine = Engine(runner, sizes=(2,))
    engine.start()
    first = held(engine, runner)
    waiting = engine.submit("a", numbers(2))
    closer = threading.Thread(target=engine.close)
    closer.start()
    with pytest.raises(Closing):
        results(waiting)
    with pytest.raises(Closing):
        engine.submit("a", numbers(3))
    runner.gate.set()
    assert results(first) == [4]
    closer.join(TIMEOUT)
    assert not closer.is_alive() and engine.waiting == 0


def test_closing_does_not_wait_longer_than_it_may(engine, runner):
    first = held(engine, runner)
    assert not engine.close(timeout=0.05)
    with pytest.raises(Closing):
        results(first)


def test_sizes_and_capacity_are_positive(runner):
    with pytest.raises(UsageError, check=mentions(0)):
        Engine(runner, sizes=(0, 2))
    with pytest.raises(UsageError, check=mentions(0)):
        Engine(runner, capacity=0)
