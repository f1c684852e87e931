"""Reads with a time limit: one thread serves them until one hangs."""

import pytest

from dalle2_jax.data import storage


def test_reads_share_a_thread_until_one_hangs():
    first, second = (storage.within(5, storage.threading.current_thread) for _ in range(2))
    assert first is second is not storage.threading.current_thread()
    hang = storage.threading.Event()
    with pytest.raises(TimeoutError, match="within 0.05 s"):
        storage.within(0.05, lambda: hang.wait(20) and "late")
    third = storage.within(5, storage.threading.current_thread)
    assert third is not first and storage.within(5, lambda: "mine") == "mine"
    hang.set()
    first.join(5)
    assert not first.is_alive() and third.is_alive()
    with pytest.raises(ZeroDivisionError):
        storage.within(5, lambda: 1 // 0)


def test_the_thread_of_reads_ends_with_its_caller():
    found = []
    caller = storage.threading.Thread(target=lambda: found.append(storage.within(5, storage.threading.current_thread)))
    caller.start()
    caller.join()
    found[0].join(5)
    assert not found[0].is_alive()
