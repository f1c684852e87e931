import os
import threading
import time

import pytest

from dalle2_jax.data import patience


def test_reads_share_a_thread_until_one_hangs():
    first, second = (patience.within(5, threading.current_thread) for _ in range(2))
    assert first is second is not threading.current_thread()
    hang = threading.Event()
    with pytest.raises(TimeoutError, match="within 0.05 s"):
        patience.within(0.05, lambda: hang.wait(20) and "late")
    third = patience.within(5, threading.current_thread)
    assert third is not first and patience.within(5, lambda: "mine") == "mine"
    hang.set()
    first.join(5)
    assert not first.is_alive() and third.is_alive()
    with pytest.raises(ZeroDivisionError):
        patience.within(5, lambda: 1 // 0)


def test_work_that_gets_on_may_take_its_time():
    pulse, steps = patience.Pulse(), []

    def work():
        for step in range(6):
            time.sleep(0.1)
            steps.append(step)
            pulse.beat()
        return "done"

    assert patience.within(0.3, work, pulse) == "done" and len(steps) == 6
    with pytest.raises(TimeoutError):
        patience.within(0.3, work)
    hang = threading.Event()
    pulse.beat()
    before = time.monotonic()
    with pytest.raises(TimeoutError):
        patience.within(0.2, lambda: hang.wait(20), pulse)
    assert time.monotonic() - before < 5
    hang.set()


def test_the_thread_of_reads_ends_with_its_caller():
    found = []
    caller = threading.Thread(target=lambda: found.append(patience.within(5, threading.current_thread)))
    caller.start()
    caller.join()
    found[0].join(5)
    assert not found[0].is_alive()


def test_a_forked_process_has_a_thread_of_its_own(monkeypatch):
    before = patience.within(5, threading.current_thread)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert patience.within(5, threading.current_thread) is not before
