import os
import threading
import time

import pytest
from raised import mentions

from dalle2_jax.data.storage import retry


def test_reads_share_a_thread_until_one_hangs():
    first, second = (retry.within(5, threading.current_thread) for _ in range(2))
    assert first is second is not threading.current_thread()
    hang = threading.Event()
    with pytest.raises(TimeoutError, check=mentions("0.05 s")):
        retry.within(0.05, lambda: hang.wait(20) and "late")
    third = retry.within(5, threading.current_thread)
    assert third is not first and retry.within(5, lambda: "done") == "done"
    hang.set()
    first.join(5)
    assert not first.is_alive() and third.is_alive()
    with pytest.raises(ZeroDivisionError):
        retry.within(5, lambda: 1 // 0)


def test_work_with_a_heartbeat_may_exceed_the_time_limit():
    heartbeat, steps = retry.Heartbeat(), []

    def work():
        for step in range(6):
            time.sleep(0.1)
            steps.append(step)
            heartbeat.beat()
        return "done"

    assert retry.within(0.3, work, heartbeat) == "done" and len(steps) == 6
    with pytest.raises(TimeoutError):
        retry.within(0.3, work)
    hang = threading.Event()
    heartbeat.beat()
    before = time.monotonic()
    with pytest.raises(TimeoutError):
        retry.within(0.2, lambda: hang.wait(20), heartbeat)
    assert time.monotonic() - before < 5
    hang.set()


def test_the_reader_thread_ends_with_its_caller():
    found = []
    caller = threading.Thread(target=lambda: found.append(retry.within(5, threading.current_thread)))
    caller.start()
    caller.join()
    found[0].join(5)
    assert not found[0].is_alive()


def test_a_forked_process_has_its_own_reader_thread(monkeypatch):
    before = retry.within(5, threading.current_thread)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert retry.within(5, threading.current_thread) is not before
