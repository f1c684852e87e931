"""Files are written completely or not at all; images are stored losslessly; grids show their images and captions."""

import errno
import io
import os
import resource
import signal
import stat

import numpy as np
import pytest
from PIL import Image
from raised import mentions

from dalle2_jax import files, lock, reading
from dalle2_jax.errors import UserError
from dalle2_jax.reading import read_users_text


def random_image(seed, side=8):
    return np.random.default_rng(seed).integers(256, size=(side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("content", [b"\x00\xff", "sh\u00e4pes\n"])
def test_writes_bytes_and_text_and_makes_folders(tmp_path, content):
    path = tmp_path / "a" / "b" / "file"
    files.write_atomically(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    files.write_atomically(path, "old")

    def fail(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, check=lambda error: error.errno == errno.EROFS):
        files.write_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(tmp_path / "file", "new")
    assert os.listdir(tmp_path) == []


def test_an_error_of_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for write, content in ((files.write_atomically, b"new"), (files.write_array, np.zeros(3))):
        with pytest.raises(OSError, check=mentions(tmp_path / "file", os.strerror(errno.ENOSPC))):
            write(tmp_path / "file", content)
    assert os.listdir(tmp_path) == []


def test_an_array_that_the_system_cuts_says_why(tmp_path):
    """Not how many of its numbers were written, which is all that numpy reports for a file that it writes itself."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(OSError, check=mentions(tmp_path / "a.npy", os.strerror(errno.EFBIG))):
            files.write_array(tmp_path / "a.npy", np.zeros(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("array", [np.arange(12, dtype=np.float16).reshape(3, 4).T, np.zeros((0, 2), bool)])
def test_arrays_come_back(tmp_path, array):
    files.write_array(tmp_path / "a.npy", array)
    found = np.load(tmp_path / "a.npy", allow_pickle=False)
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype


def test_a_png_is_lossless(tmp_path):
    files.write_png(tmp_path / "a.png", random_image(0))
    with Image.open(io.BytesIO((tmp_path / "a.png").read_bytes())) as image:
        np.testing.assert_array_equal(np.asarray(image), random_image(0))


def test_a_grid_shows_every_image_enlarged_by_an_integer_factor():
    images = [random_image(seed, 48) for seed in range(5)]
    sheet = files.captioned_grid(images, ["", "a small red circle", "word " * 90, "x" * 90, "b"], columns=2)
    pad, cell = files._PAD, 48 * 3
    rows = cell + files._LINES * files._LINE + pad
    assert sheet.shape == (3 * rows + pad, 2 * (cell + pad) + pad, 3)
    for place, one in enumerate(images):
        top, left = pad + place // 2 * rows, pad + place % 2 * (cell + pad)
        shown = sheet[top : top + cell, left : left + cell]
        np.testing.assert_array_equal(shown, one.repeat(3, axis=0).repeat(3, axis=1))
        below = sheet[top + cell : top + rows - pad, left : left + cell]
        assert below.min() < 100  # its caption, "(no caption)" for an empty one
    assert (sheet[2 * rows + pad :, cell + 2 * pad :] == 235).all()  # the sixth cell is empty


def test_a_grid_is_no_wider_than_its_images_and_needs_a_caption_for_each():
    assert files.captioned_grid([random_image(0, 200)], ["one"]).shape[1] == 200 + 2 * files._PAD
    with pytest.raises(ValueError):
        files.captioned_grid([random_image(0)], ["one", "two"])


@pytest.mark.parametrize(("umask", "of_file", "of_folder"), [(0o002, 0o664, 0o775), (0o077, 0o600, 0o700)])
def test_files_and_folders_follow_the_umask(tmp_path, umask, of_file, of_folder):
    before = os.umask(umask)
    try:
        files.write_atomically(tmp_path / "file", "a")
        with lock.unfinished(tmp_path, ".folder") as folder:
            mode = stat.S_IMODE(folder.stat().st_mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == of_file
    assert mode == of_folder


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_text_may_begin_with_a_byte_order_mark(start, tmp_path):
    (tmp_path / "a.txt").write_text(f"{start}café\nred\n", encoding="utf-8")
    assert read_users_text(tmp_path / "a.txt") == "café\nred\n"


@pytest.mark.parametrize(
    ("encoding", "line"), [("latin-1", 2), ("utf-16", 1), ("utf-16-le", 1), ("utf-16-be", 1), ("utf-32", 1)]
)
def test_text_of_another_encoding_is_rejected(encoding, line, tmp_path):
    (tmp_path / "a.txt").write_text("red\ncafé\n", encoding=encoding)
    with pytest.raises(UserError, check=mentions(tmp_path / "a.txt", "UTF-8", f"line {line}")):
        read_users_text(tmp_path / "a.txt")


def test_text_without_end_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_TEXT", 4)
    (tmp_path / "a.txt").write_text("abcd")
    assert read_users_text(tmp_path / "a.txt") == "abcd"
    (tmp_path / "a.txt").write_text("abcde")
    with pytest.raises(UserError, check=mentions(tmp_path / "a.txt", "4 bytes")):
        read_users_text(tmp_path / "a.txt")
