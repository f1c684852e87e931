"""Untrusted data sets: sizes that files claim are checked before memory is allocated, and nothing is unpickled."""

import contextlib
import io
import json
import os
import tarfile
import zipfile

import numpy as np
import pytest
from hostile_files import npy, pickled
from raised import mentions
from tar_files import members as records
from tar_files import png, tar

from dalle2_jax.data import FolderRecords, Rejected, WebdatasetRecords
from dalle2_jax.data.embeddings import clip_retrieval
from dalle2_jax.data.formats import folder as folder_module
from dalle2_jax.data.formats import folder_index, shard_index, webdataset
from dalle2_jax.data.formats.tar_headers import DamagedError, members
from dalle2_jax.data.storage import files
from dalle2_jax.data.storage.arrays import (
    BYTES,
    NUMBERS,
    Kind,
    map_arrays,
    unpack_arrays,
    write_arrays,
)
from dalle2_jax.errors import DataError, UserError

pytestmark = pytest.mark.usefixtures("alone")


_ARRAYS = {
    "of objects": pickled(),
    "enormous": npy((10**12,)),
    "beyond 64 bits": npy((2**40, 2**40)),
    "negative": npy((-1,)),
    "of truth values": npy((True,), content=bytes(8)),
    "another type": npy((1,), "<f8", bytes(8)),
    "another shape": npy((1, 1), content=bytes(8)),
    "by columns": npy((1,), content=bytes(8), columnwise=True),
    "a header that is no dict": b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 15 + b"\n",
    "no array": b"nothing",
    "empty": b"",
}


@pytest.mark.parametrize("case", _ARRAYS)
def test_arrays_have_the_expected_type_or_are_rejected(case, tmp_path):
    (tmp_path / "a").write_bytes(_ARRAYS[case])
    with pytest.raises((ValueError, OSError)):
        map_arrays(tmp_path / "a", [NUMBERS])
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", _ARRAYS[case])
    for content in (file.getvalue(), file.getvalue()[:-5], b""):
        with pytest.raises(ValueError, check=str):
            unpack_arrays(content, {"a": NUMBERS}, 2**20)
    (tmp_path / "a").rename(tmp_path / "img_emb_0.npy")
    if case not in ("another type", "another shape", "by columns"):
        with pytest.raises(DataError, check=mentions(path=tmp_path / "img_emb_0.npy")):
            clip_retrieval._mapped(tmp_path / "img_emb_0.npy")


def test_a_small_archive_of_large_arrays_is_not_unpacked():
    file = io.BytesIO()
    np.savez_compressed(file, a=np.zeros(2**22, np.uint8))
    assert len(file.getvalue()) < 2**14
    assert len(unpack_arrays(file.getvalue(), {"a": BYTES}, 2**23)["a"]) == 2**22
    with pytest.raises(ValueError, check=mentions("large")):
        unpack_arrays(file.getvalue(), {"a": BYTES}, 2**20)


# --- tar shards -------------------------------------------------------------------------------


def index_of(source):
    [path] = source._files.paths
    return shard_index.Index(
        *map_arrays(source._home, [Kind(np.int64, (None, 2)), *shard_index._KINDS.values()])[1:]
    ), path


def _hostile_rows(rows, column, value):
    changed = rows.copy()
    changed[0, column] = value
    return changed


@pytest.fixture
def shard(tmp_path):
    """Returns a shard of three records, opened once, so that its index is stored next to it."""
    path = tar(tmp_path / "00000.tar", records(range(3)))
    WebdatasetRecords(str(path))
    return path


_CHANGES = {
    "offset": lambda index: index._replace(rows=_hostile_rows(index.rows, 0, 10**15)),
    "size": lambda index: index._replace(rows=_hostile_rows(index.rows, 1, 2**28)),
    "negative size": lambda index: index._replace(rows=_hostile_rows(index.rows, 1, -5)),
    "overflow": lambda index: index._replace(rows=_hostile_rows(_hostile_rows(index.rows, 0, 2**62), 1, 2**62)),
    "ends": lambda index: index._replace(ends=index.ends[::-1].copy()),
    "fewer ends": lambda index: index._replace(ends=index.ends[:1]),
    "starts": lambda index: index._replace(starts=np.array([0, 10**9])),
    "more starts": lambda index: index._replace(starts=np.array([0, 2, 3])),
    "about": lambda index: index._replace(about=np.frombuffer(b"[1]", np.uint8)),
    "deep about": lambda index: index._replace(about=np.frombuffer(b"[" * 10**5, np.uint8)),
    "counts": lambda index: index._replace(about=np.frombuffer(b'{"counts": {"a": "b"}, "first": {}}', np.uint8)),
}


@pytest.mark.parametrize("case", _CHANGES)
def test_an_index_delivered_with_a_shard_is_not_trusted(case, shard):
    """The index is rebuilt, or the record it misdescribes is rejected."""
    source = WebdatasetRecords(str(shard))
    stamps = source._files.stamps
    index = _CHANGES[case](shard_index._scan_one(source._files, 0, shard_index.Heartbeat()))
    sidecar, cached = shard.with_name(f"{shard.name}.index.npz"), next(shard.parent.glob(".*.index"))
    np.savez(sidecar, version=shard_index._VERSION, stamp=stamps[0], **index._asdict())
    cached.unlink()
    fresh = WebdatasetRecords(str(shard))
    assert len(fresh) == 3 and fresh.read(0).image == png(0)
    write_arrays(cached, [stamps, *index])
    opened = WebdatasetRecords(str(shard))
    try:
        assert opened.read(0).image == png(0)
    except Rejected as rejection:
        assert rejection.cause in ("cut short", "far too large")


def test_a_cached_filter_result_delivered_with_a_shard_is_not_trusted(shard):
    filters = webdataset.Filters(ranges={"number": (1, None)})
    source = WebdatasetRecords(str(shard), filters=filters)
    assert source.read(0).image == png(1)
    [choice] = [path for path in shard.parent.glob(".*.index.*")]
    write_arrays(choice, [np.array([10**9, -1, 0]), np.frombuffer(b"{}", np.uint8)])
    changed = WebdatasetRecords(str(shard), filters=filters)
    for index in (0, 1):
        with pytest.raises(Rejected):
            changed.read(index)
    write_arrays(choice, [np.array([0.5]), np.frombuffer(b"{}", np.uint8)])
    assert WebdatasetRecords(str(shard), filters=filters).read(0).image == png(1)


@pytest.mark.parametrize("content", [b"\0" * 100, b"PK\x03\x04", pickled(), b"x" * 2**21])
def test_a_file_that_is_not_an_index_is_replaced(content, shard):
    shard.with_name(f"{shard.name}.index.npz").write_bytes(content)
    next(shard.parent.glob(".*.index")).write_bytes(content)
    assert len(WebdatasetRecords(str(shard))) == 3


def test_a_pipe_in_place_of_an_index_does_not_block(shard):
    for path in (shard.with_name(f"{shard.name}.index.npz"), next(shard.parent.glob(".*.index"))):
        path.unlink()
        os.mkfifo(path)
    assert len(WebdatasetRecords(str(shard))) == 3


def header(name, size, kind=b"0"):
    """Returns a tar header that claims a size, in binary (base-256) notation."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size.to_bytes(12, "big", signed=size < 0) if size < 0 else b"\x80" + size.to_bytes(11, "big")
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


class Sized(io.BytesIO):
    """A file that fails on a read without a size or of more than 2 MiB."""

    def read(self, size=-1):
        assert 0 <= size <= 2**21, "the size of the read is not limited"
        return super().read(size)


@pytest.mark.parametrize("size", [2**40, 2**62, 2**64, 2**80, -512])
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g", b"K", b"S", b"5", b"9"])
def test_a_size_claimed_by_a_tar_header_is_not_trusted(size, kind):
    valid = io.BytesIO()
    with tarfile.open(fileobj=valid, mode="w", format=tarfile.GNU_FORMAT) as file:
        info = tarfile.TarInfo("a.txt")
        info.size = 3
        file.addfile(info, io.BytesIO(b"abc"))
    content = valid.getvalue()[:1024] + header("b.txt", size, kind) + bytes(2048)
    found = []
    # a folder has no content
    with contextlib.suppress(DamagedError) if kind == b"5" else pytest.raises(DamagedError):
        for member in members(Sized(content)):
            found.append(member.name)
    assert found[0] == "a.txt"


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_a_claimed_size_is_not_trusted_where_tarfile_takes_over(kind):
    """tarfile takes over at the first header that extends a name (GNU long name or PAX)."""
    unusual = io.BytesIO()
    with tarfile.open(fileobj=unusual, mode="w", format=tarfile.PAX_FORMAT) as file:
        file.addfile(tarfile.TarInfo("ü" * 60))
    content = unusual.getvalue()[: 3 * 512] + header("b.txt", 2**40, kind) + bytes(2048)
    with pytest.raises(DamagedError):
        list(members(Sized(content)))


def test_a_long_chain_of_extension_headers_is_rejected():
    pax_record = b"20 path=abcdefghijk\n"
    one = header("x", len(pax_record), b"x") + pax_record.ljust(512, b"\0")
    with pytest.raises(DamagedError):
        list(members(io.BytesIO(one * 3000)))


def test_a_shard_with_too_many_members_is_truncated(monkeypatch, tmp_path):
    monkeypatch.setattr(shard_index, "_MAX_RECORDS", 4)
    path = tar(tmp_path / "many.tar", records(range(9)))
    source = WebdatasetRecords(str(path))
    assert len(source) == 4 and "shard damaged" in source.rejections.counts


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("{0..99999999999}", "10,000,000"),
        ("{0..9999}" * 3, "10,000,000"),
        ("{0..%s}" % ("9" * 5000), "range of numbers"),
    ],
)
def test_a_pattern_that_expands_to_too_many_names_is_rejected(pattern, reason):
    with pytest.raises(UserError, check=mentions(reason)):
        files.expand_braces(pattern)


# --- folders ----------------------------------------------------------------------------------


@pytest.fixture
def image_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside.png").write_bytes(png(1))
    (folder / "a.png").write_bytes(png(2))
    return folder


@pytest.mark.parametrize("name", ["../outside.png", "./../outside.png", "b/../../outside.png", "{}/outside.png"])
def test_metadata_may_only_name_images_inside_its_folder(name, image_folder):
    named = [{"file_name": name.format(image_folder.parent), "text": "x"}, {"file_name": "./a.png", "text": "y"}]
    (image_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, named)))
    source = FolderRecords(image_folder)
    assert len(source) == 1 and source.rejections.counts == {"missing": 1}


def test_metadata_lines_and_fields_have_a_maximum_length(image_folder, monkeypatch):
    monkeypatch.setattr(folder_index, "MAX_TEXT", 2**10)
    long = json.dumps({"file_name": "a.png", "text": "x" * 5000})
    (image_folder / "metadata.jsonl").write_text(f'{long}\n{{"file_name": "a.png", "text": "y"}}\n')
    source = FolderRecords(image_folder)
    assert source.read(0).captions == ("y",) and source.rejections.counts == {"broken metadata": 1}
    (image_folder / "metadata.jsonl").unlink()
    monkeypatch.undo()
    table = f'file_name,text\na.png,"{"x" * 200_000}"\na.png,y\n'
    (image_folder / "metadata.csv").write_text(table)
    source = FolderRecords(image_folder)
    assert source.read(0).captions == ("y",) and source.rejections.counts == {"broken metadata": 1}


def test_a_caption_file_has_a_maximum_length(image_folder, monkeypatch):
    monkeypatch.setattr(folder_module, "MAX_TEXT", 100)
    (image_folder / "a.txt").write_text("x" * 101)
    with pytest.raises(Rejected, check=mentions(cause="far too large")):
        FolderRecords(image_folder).read(0)


def test_a_caption_in_a_shard_has_a_maximum_length(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_TEXT", 100)
    path = tar(tmp_path / "a.tar", [("a.png", png(1)), ("a.txt", b"x" * 101), ("b.png", png(2)), ("b.txt", b"x")])
    source = WebdatasetRecords(str(path))
    with pytest.raises(Rejected, check=mentions(cause="far too large")):
        source.read(0)
    assert source.read(1).captions == ("x",)
