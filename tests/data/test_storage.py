import os

import pytest

from dalle2_jax.data import patience, storage


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system has no reads that do not wait")
def test_what_lies_in_memory_is_read_at_once_and_all_else_by_the_thread(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    files, by_thread, within = storage.Files(str(tmp_path), ".tar"), [], patience.within
    lacking = 0

    def preadv(_, buffers, offset, flags):
        assert flags == os.RWF_NOWAIT
        if lacking is None:
            raise BlockingIOError
        buffers[0][:] = b"0123456789"[offset : offset + len(buffers[0])]
        return len(buffers[0]) - lacking

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(patience, "within", lambda *words: by_thread.append(words) or within(*words))
    assert files.read(0, [(2, 3)]) == [b"234"] and len(by_thread) == 1  # which opened the file
    assert files.read(0, [(2, 3), (0, 1), (9, 0)]) == [b"234", b"0", b""] and len(by_thread) == 1
    for lacking in (None, 1):
        by_thread.clear()
        assert files.read(0, [(2, 3), (0, 1)]) == [b"234", b"0"] and len(by_thread) == 1
