import os
import threading

import pytest

from dalle2_jax.data import storage


def test_reads_share_a_thread_until_one_hangs():
    first, second = (storage.within(5, threading.current_thread) for _ in range(2))
    assert first is second is not threading.current_thread()
    hang = threading.Event()
    with pytest.raises(TimeoutError, match="within 0.05 s"):
        storage.within(0.05, lambda: hang.wait(20) and "late")
    third = storage.within(5, threading.current_thread)
    assert third is not first and storage.within(5, lambda: "mine") == "mine"
    hang.set()
    first.join(5)
    assert not first.is_alive() and third.is_alive()
    with pytest.raises(ZeroDivisionError):
        storage.within(5, lambda: 1 // 0)


def test_the_thread_of_reads_ends_with_its_caller():
    found = []
    caller = threading.Thread(target=lambda: found.append(storage.within(5, threading.current_thread)))
    caller.start()
    caller.join()
    found[0].join(5)
    assert not found[0].is_alive()


def test_a_forked_process_has_a_thread_of_its_own(monkeypatch):
    before = storage.within(5, threading.current_thread)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert storage.within(5, threading.current_thread) is not before


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system has no reads that do not wait")
def test_what_lies_in_memory_is_read_at_once_and_all_else_by_the_thread(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    files, by_thread, within = storage.Files(str(tmp_path), ".tar"), [], storage.within
    lacking = 0

    def preadv(_, buffers, offset, flags):
        assert flags == os.RWF_NOWAIT
        if lacking is None:
            raise BlockingIOError
        buffers[0][:] = b"0123456789"[offset : offset + len(buffers[0])]
        return len(buffers[0]) - lacking

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(storage, "within", lambda *words: by_thread.append(words) or within(*words))
    assert files.read(0, [(2, 3)]) == [b"234"] and len(by_thread) == 1  # which opened the file
    assert files.read(0, [(2, 3), (0, 1), (9, 0)]) == [b"234", b"0", b""] and len(by_thread) == 1
    for lacking in (None, 1):
        by_thread.clear()
        assert files.read(0, [(2, 3), (0, 1)]) == [b"234", b"0"] and len(by_thread) == 1
