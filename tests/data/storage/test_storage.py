import os

import pytest

from dalle2_jax.data.storage import files, retry


def test_existing_paths_are_literal_even_if_they_look_like_patterns(tmp_path):
    base = str(tmp_path / "a{b,c}[d]")
    assert files.literal_part(f"{base}/0.tar") == str(tmp_path)
    (tmp_path / "a{b,c}[d]").mkdir()
    for rest in ("", "/*.tar", "/{0..3}/{split}.tar"):
        assert files.literal_part(base + rest) == base
    assert files.literal_part("memory://data/{0..3}.tar") == files.literal_part("{0..3}.tar") == ""
    for number in (0, 1):
        (tmp_path / "a{b,c}[d]" / f"{number}[x].tar").write_bytes(b"0")
    (tmp_path / "ab[d]").mkdir()
    (tmp_path / "ab[d]" / "2.tar").write_bytes(b"0")
    for pattern in (base, f"{base}/*.tar", f"{base}/{{0..1}}[x].tar"):
        assert files.Files(pattern, ".tar").paths == [f"{base}/0[x].tar", f"{base}/1[x].tar"]
    assert files.Files(f"{base}/1[x].tar", ".tar").paths == [f"{base}/1[x].tar"]
    assert files.Files(f"{tmp_path}/?{{b,c}}[[]d]/*.tar", ".tar").paths == [f"{tmp_path}/ab[d]/2.tar"]


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="this system has no non-blocking reads")
def test_cached_pages_are_read_directly_and_others_by_the_reader_thread(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    lacking = 0
    tar_files, by_thread, within = files.Files(str(tmp_path), ".tar"), [], retry.within

    def preadv(_, buffers, offset, flags):
        assert flags == os.RWF_NOWAIT
        if lacking is None:
            raise BlockingIOError
        buffers[0][:] = b"0123456789"[offset : offset + len(buffers[0])]
        return len(buffers[0]) - lacking

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(retry, "within", lambda *args: by_thread.append(args) or within(*args))
    assert tar_files.read(0, [(2, 3)]) == [b"234"] and len(by_thread) == 1  # the call that opened the file
    assert tar_files.read(0, [(2, 3), (0, 1), (9, 0)]) == [b"234", b"0", b""] and len(by_thread) == 1
    for missing in (None, 1):
        lacking = missing
        by_thread.clear()
        assert tar_files.read(0, [(2, 3), (0, 1)]) == [b"234", b"0"] and len(by_thread) == 1
