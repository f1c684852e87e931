"""Torch files read without torch: state dicts as archives, and in the older format with any strides."""

import pickle
import struct
import time

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import WeightsError
from dalle2_jax.weights import torch_files
from dalle2_jax.weights.tensors import open_tensors

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
SIX = np.arange(6, dtype=np.float32)


@pytest.fixture(autouse=True)
def without_torch(monkeypatch):
    def absent(path):
        raise WeightsError("torch", path)

    monkeypatch.setattr(torch_files, "_open_torch", absent)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def row(values):
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


def tensor(shape, strides, offset=0, storage="7", part=b"N", kind="FloatStorage"):
    """A tensor as torch describes one in the older format: opcodes of a pickle."""
    place = (
        b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(storage) + text("cpu") + b"K\x06" + part + b"tQ"
    )
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + b"J" + struct.pack("<i", offset)
    return rebuilt + row(shape) + row(strides) + b"\x89ccollections\nOrderedDict\n)RtR"


def state(**tensors):
    """An OrderedDict with an attribute, as ``Module.state_dict`` returns it."""
    items = b"".join(text(name) + value for name, value in tensors.items())
    return b"ccollections\nOrderedDict\n)R(" + items + b"u}" + text("_metadata") + b"}sb"


def older(path, description, storages, magic=MAGIC, little=True):
    """Writes a file in the older format."""
    with path.open("wb") as file:
        for value in (magic, PROTOCOL, {"protocol_version": PROTOCOL, "little_endian": little, "type_sizes": {}}):
            pickle.dump(value, file, 2)
        file.write(b"\x80\x02" + description + b".")
        pickle.dump(list(storages), file, 2)
        for values in storages.values():
            file.write(struct.pack("<q", values.size) + values.tobytes())
    return path


def test_strides_of_the_older_format(tmp_path):
    """EfficientNet-Lite0's published kernels are transposed views."""
    described = state(columns=tensor((2, 3), (1, 2)), part=tensor((2,), (1,), 4), half=tensor((), (), 1, "1"))
    storages = {"7": SIX, "1": np.array([0.5, 0.25], np.float32)}
    tensors = open_tensors(older(tmp_path / "x.pth", described, storages))
    assert {key: each.shape for key, each in tensors.items()} == {"columns": (2, 3), "part": (2,), "half": ()}
    np.testing.assert_array_equal(tensors["columns"].read(), SIX.reshape(3, 2).T)
    np.testing.assert_array_equal(tensors["part"].read(), [4, 5])
    assert tensors["half"].read() == 0.25


def test_dtypes_of_the_older_format(tmp_path):
    described = state(n=tensor((), (), storage="n", kind="LongStorage"), d=tensor((6,), (1,), kind="DoubleStorage"))
    storages = {"n": np.array([3], np.int64), "7": SIX.astype(np.float64)}
    tensors = open_tensors(older(tmp_path / "x.pth", described, storages))
    assert tensors["n"].read().dtype == np.int64 and tensors["n"].read() == 3
    assert tensors["d"].read().dtype == np.float32


DAMAGED = {
    "a magic number": dict(magic=MAGIC + 1),
    "big-endian": dict(little=False),
    "past the end": dict(description=state(w=tensor((7,), (1,)))),
    "a stride past the end": dict(description=state(w=tensor((2, 2), (6, 1)))),
    "a storage that is missing": dict(description=state(w=tensor((6,), (1,), storage="8"))),
    "a part of a storage": dict(description=state(w=tensor((6,), (1,), part=b"(" + text("7") + b"K\x00K\x06t"))),
    "a storage of two dtypes": dict(description=state(w=tensor((6,), (1,)), v=tensor((1,), (1,), kind="LongStorage"))),
    "no tensors": dict(description=b"}"),
    "a length of terabytes": dict(description=b"\x8e" + struct.pack("<Q", 2**40)),
}


@pytest.mark.parametrize("wrong", DAMAGED)
def test_a_damaged_file_of_the_older_format(tmp_path, wrong):
    options = {"description": state(w=tensor((6,), (1,))), "storages": {"7": SIX}, **DAMAGED[wrong]}
    assert_error(older(tmp_path / "x.pth", **options))


def assert_error(path):
    start = time.process_time()
    with pytest.raises(WeightsError, check=mentions(path, path=path)):
        for each in open_tensors(path).values():
            each.read()
    assert time.process_time() - start < 5


def test_a_file_of_the_older_format_cut_short(tmp_path):
    path = older(tmp_path / "x.pth", state(w=tensor((6,), (1,))), {"7": SIX})
    content = path.read_bytes()
    for size in (5, 20, 100, len(content) - 30, len(content) - 1):
        path.write_bytes(content[:size])
        assert_error(path)


def test_a_storage_that_claims_exabytes(tmp_path):
    path = older(tmp_path / "x.pth", state(w=tensor((6,), (1,))), {"7": SIX})
    content = path.read_bytes()
    for count in (2**60, -1):
        path.write_bytes(content[: -SIX.nbytes - 8] + struct.pack("<q", count) + SIX.tobytes())
        assert_error(path)


def test_more_than_tensors_is_left_to_torch(tmp_path):
    described = state(w=tensor((6,), (1,)), x=b"cposix\nsystem\n(" + text("true") + b"tR")
    with pytest.raises(WeightsError, match="^torch$"):
        open_tensors(older(tmp_path / "x.pth", described, {"7": SIX}))
