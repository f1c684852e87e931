import os

import pytest

from dalle2_jax.data import patience, storage


def test_what_is_there_as_it_is_written_is_no_pattern(tmp_path):
    base = str(tmp_path / "a{b,c}[d]")
    assert storage.literal_part(f"{base}/0.tar") == str(tmp_path)
    (tmp_path / "a{b,c}[d]").mkdir()
    for rest in ("", "/*.tar", "/{0..3}/{split}.tar"):
        assert storage.literal_part(base + rest) == base
    assert storage.literal_part("memory://data/{0..3}.tar") == storage.literal_part("{0..3}.tar") == ""
    for number in (0, 1):
        (tmp_path / "a{b,c}[d]" / f"{number}[x].tar").write_bytes(b"0")
    (tmp_path / "ab[d]").mkdir()
    (tmp_path / "ab[d]" / "2.tar").write_bytes(b"0")
    for pattern in (base, f"{base}/*.tar", f"{base}/{{0..1}}[x].tar"):
        assert storage.Files(pattern, ".tar").paths == [f"{base}/0[x].tar", f"{base}/1[x].tar"]
    assert storage.Files(f"{base}/1[x].tar", ".tar").paths == [f"{base}/1[x].tar"]
    assert storage.Files(f"{tmp_path}/?{{b,c}}[[]d]/*.tar", ".tar").paths == [f"{tmp_path}/ab[d]/2.tar"]


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
