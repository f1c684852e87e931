"""Tensor files: reading, errors for damaged and hostile files, and writing."""

import builtins
import importlib.util
import json
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from clips import FIXTURES
from raised import mentions
from safetensors.numpy import load_file, save_file

from dalle2_jax.errors import WeightsError
from dalle2_jax.weights.tensors import add_prefix, open_tensors, strip_prefix, write_safetensors

TORCHSCRIPT = FIXTURES / "weights" / "clip_torchscript.pt"
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def assert_error(path, *facts):
    """Asserts that reading a file raises a WeightsError for the file, of one line that mentions facts."""
    with pytest.raises(WeightsError, check=mentions(path, *facts, path=path)):
        for tensor in open_tensors(path).values():
            tensor.read()


# --- safetensors ----------------------------------------------------------------------------


def written(path, arrays, dtype=np.float32):
    write_safetensors(path, {key: value.shape for key, value in arrays.items()}, arrays.items(), dtype)
    return path


ARRAYS = {"b": np.arange(6.0).reshape(2, 3), "a": np.array(0.5), "empty": np.zeros((0, 4))}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_written_is_read_as_float32(tmp_path, dtype):
    tensors = open_tensors(written(tmp_path / "x.safetensors", ARRAYS, dtype))
    assert {key: tensor.shape for key, tensor in tensors.items()} == {"a": (), "b": (2, 3), "empty": (0, 4)}
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(dtype).name}
    for key, tensor in tensors.items():
        assert tensor.read().dtype == np.float32
        np.testing.assert_array_equal(tensor.read(), ARRAYS[key])  # each is exact in half precision


def test_others_read_what_is_written(tmp_path):
    for key, value in load_file(written(tmp_path / "x.safetensors", ARRAYS)).items():
        np.testing.assert_array_equal(value, ARRAYS[key].astype(np.float32))


def test_what_others_write_is_read(tmp_path):
    arrays = {"i": np.array([[3, 4]], np.int64), "d": np.array([0.1]), "h": np.array([0.1], np.float16)}
    save_file(arrays, tmp_path / "x.safetensors")
    read = {key: tensor.read() for key, tensor in open_tensors(tmp_path / "x.safetensors").items()}
    assert {key: value.dtype for key, value in read.items()} == {"i": np.int64, "d": np.float32, "h": np.float32}
    np.testing.assert_array_equal(read["i"], arrays["i"])


def test_written_tensors_must_match_the_given_shapes(tmp_path):
    for shapes, facts in (({"b": (3, 2)}, ["b", (2, 3), (3, 2)]), ({"b": (2, 3), "c": (1,)}, ["c"])):
        with pytest.raises(ValueError, check=mentions(*facts)):
            write_safetensors(tmp_path / "x.safetensors", shapes, [("b", ARRAYS["b"])])


@pytest.mark.parametrize("size", [0, 5, 40, -1])
def test_a_safetensors_file_cut_short(tmp_path, size):
    path = written(tmp_path / "x.safetensors", ARRAYS)
    path.write_bytes(path.read_bytes()[:size])
    assert_error(path, "damaged")


def test_a_safetensors_file_of_another_kind(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 12) + b"not json at all")
    assert_error(tmp_path / "x.safetensors", "damaged")


def index(folder, content):
    (folder / "x.safetensors.index.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "x.safetensors.index.json"


def test_an_index_joins_its_files(tmp_path):
    for name, key in (("1.safetensors", "a"), ("2.safetensors", "b")):
        written(tmp_path / name, {key: ARRAYS[key], "unlisted": np.zeros(1)})
    path = index(tmp_path, {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    tensors = open_tensors(path)
    assert {*tensors} == {"a", "b"}
    np.testing.assert_array_equal(tensors["b"].read(), ARRAYS["b"])
    index(tmp_path, {"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}})
    with pytest.raises(WeightsError, check=mentions(path=tmp_path / "1.safetensors", missing=("b",))):
        open_tensors(path)
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(WeightsError, check=mentions(path=tmp_path / "1.safetensors", missing=())):
        open_tensors(path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", {"weight_map": "no"}, {"weight_map": ["one"]}])
def test_an_invalid_index(tmp_path, content):
    assert_error(index(tmp_path, content), "weight_map" if "weight_map" in content or content == "{}" else "JSON")


def test_a_file_name_of_another_kind(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert_error(tmp_path / "x.gguf", ".safetensors", ".pt")
    assert_error(tmp_path / "none.pt", "no file")


def test_prefixes():
    assert add_prefix("a.", {"b": 1}) == {"a.b": 1}
    assert strip_prefix("a.", {"a.b": 1, "b": 2, "aa.c": 3}) == {"b": 1}


# --- TorchScript ----------------------------------------------------------------------------


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def row(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(shape, strides, offset=0, storage="0", kind="FloatStorage"):
    """A tensor as torch describes one: opcodes of a pickle."""
    place = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(storage) + text("cpu") + number(6) + b"tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + number(offset) + row(shape) + row(strides)
    return rebuilt + b"\x89ccollections\nOrderedDict\n)RtR"


def module(**attributes):
    """A module with these attributes, each given as opcodes."""
    items = b"".join(text(name) + value for name, value in attributes.items())
    return b"c__torch__.torch.nn.modules.module.___torch_mangle_0\nModule\n)\x81}(" + items + b"ub"


def archived(path, description, **storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("clip/data.pkl", b"\x80\x02" + description + b".")
        archive.writestr("clip/constants.pkl", b"\x80\x02).")
        archive.writestr("clip/code/__torch__.py", "raise SystemExit")
        for name, value in storages.items():
            archive.writestr(f"clip/data/{name.removeprefix('s')}", value.tobytes())
    return path


SIX = np.arange(6, dtype=np.float32)


def test_an_archive_is_read_without_torch(tmp_path, monkeypatch):
    forbid_torch(monkeypatch)
    inner = module(weight=tensor((2, 3), (3, 1)), training=b"\x89")
    lists = b"ctorch.jit._pickle\nbuild_intlist\n(" + b"(lp0\n" + number(1) + b"atR"
    described = module(proj=tensor((2, 2), (1, 3), 1), inner=inner, size=number(7), padding=lists, none=b"N")
    tensors = open_tensors(archived(tmp_path / "x.pt", described, s0=SIX))
    assert {key: value.shape for key, value in tensors.items()} == {"proj": (2, 2), "inner.weight": (2, 3)}
    np.testing.assert_array_equal(tensors["proj"].read(), [[1, 4], [2, 5]])
    np.testing.assert_array_equal(tensors["inner.weight"].read(), SIX.reshape(2, 3))
    assert len(open_tensors(TORCHSCRIPT)) == 41


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("HalfStorage", np.float16), ("BFloat16Storage", ml_dtypes.bfloat16), ("DoubleStorage", np.float64)],
)
def test_floats_of_an_archive_become_float32(tmp_path, kind, dtype):
    path = archived(tmp_path / "x.pt", module(w=tensor((6,), (1,), kind=kind)), s0=SIX.astype(dtype))
    value = open_tensors(path)["w"].read()
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value, SIX)


INVALID_TENSORS = {
    "past the end": tensor((3, 3), (3, 1)),
    "a stride past the end": tensor((2, 2), (6, 1)),
    "an offset past the end": tensor((1,), (1,), 6),
    "before the beginning": tensor((2,), (1,), -2),
    "backwards": tensor((2,), (-1,), 1),
    "of other dimensions": tensor((2,), (1, 1)),
    "in a missing storage": tensor((2,), (1,), storage="9"),
    "without a storage": b"ctorch._utils\n_rebuild_tensor_v2\n()tR",
}


@pytest.mark.parametrize("case", INVALID_TENSORS)
def test_a_tensor_outside_its_storage(tmp_path, case):
    assert_error(archived(tmp_path / "x.pt", module(w=INVALID_TENSORS[case]), s0=SIX), "damaged")


@pytest.mark.parametrize("description", [b"", b"(", b"}b", module(w=b"h\x05"), b"q\x00" + module()[:-2] + b"X"])
def test_a_description_cut_short(tmp_path, description):
    assert_error(archived(tmp_path / "x.pt", description), "damaged")


def test_a_module_that_contains_itself(tmp_path):
    itself = b"c__torch__\nModule\n)\x81q\x00}(" + text("inner") + b"h\x00ub"
    assert_error(archived(tmp_path / "x.pt", itself), "damaged")


@pytest.mark.parametrize("size", [2000, 40_000, -100])
def test_an_archive_cut_short(tmp_path, size):
    (tmp_path / "x.pt").write_bytes(TORCHSCRIPT.read_bytes()[:size])
    assert_error(tmp_path / "x.pt", "damaged")


def test_an_archive_with_a_flipped_bit_in_a_tensor(tmp_path):
    raw = bytearray(TORCHSCRIPT.read_bytes())
    with zipfile.ZipFile(TORCHSCRIPT) as archive:
        largest = max((info for info in archive.infolist() if "/data/" in info.filename), key=lambda i: i.file_size)
    name, extra = struct.unpack("<HH", raw[largest.header_offset + 26 :][:4])
    raw[largest.header_offset + 30 + name + extra + 7] ^= 1
    (tmp_path / "x.pt").write_bytes(raw)
    assert_error(tmp_path / "x.pt", "damaged", "CRC")


CALLS = {
    "os.system": b"cos\nsystem\n(" + text("touch {}") + b"tR",
    "builtins.eval": b"cbuiltins\neval\n(" + text("open({!r}, 'w')") + b"tR",
    "torch.nn.modules.linear.Linear": b"ctorch.nn.modules.linear\nLinear\n)\x81",
    "__torch__os.system": b"c__torch__os\nsystem\n(" + text("touch {}") + b"tR",
}


@pytest.mark.parametrize("name", CALLS)
def test_an_archive_that_would_run_code(tmp_path, name):
    mark = tmp_path / "mark"
    call = pickle_of_call(name, mark)
    assert_error(archived(tmp_path / "x.pt", module(w=call)), "run code", name)
    assert not mark.exists()


def pickle_of_call(name, mark):
    """The call's opcodes with the mark's path filled in."""
    head, _, rest = CALLS[name].partition(b"X")
    if not rest:
        return CALLS[name]
    size = struct.unpack("<I", rest[:4])[0]
    return head + text(rest[4 : 4 + size].decode().format(str(mark))) + rest[4 + size :]


def test_the_calls_would_run(tmp_path):
    """Otherwise the test above could not fail."""
    mark = tmp_path / "mark"
    pickle.loads(b"\x80\x02" + pickle_of_call("os.system", mark) + b".")
    assert mark.exists()


# --- torch ----------------------------------------------------------------------------------


def forbid_torch(monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)


def test_torch_files_require_torch(tmp_path, monkeypatch):
    forbid_torch(monkeypatch)
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"cargparse\nNamespace\n)R.")
    assert_error(tmp_path / "x.pt", "dalle2_jax[torch]")


@needs_torch
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read(tmp_path, wrapper, zipped):
    import torch

    state = {"w": torch.arange(6.0).reshape(2, 3).T.half(), "n": torch.tensor(3), "name": "clip"}
    content = {wrapper: state, "step": 7} if wrapper else state
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    tensors = open_tensors(tmp_path / "x.ckpt")
    assert {key: (value.shape, value.dtype) for key, value in tensors.items()} == {
        "w": ((3, 2), "float16"),
        "n": ((), "int64"),
    }
    np.testing.assert_array_equal(tensors["w"].read(), SIX.reshape(2, 3).T)
    assert tensors["w"].read().dtype == np.float32


@needs_torch
def test_a_list_of_tensors_is_numbered(tmp_path):
    """Karlo's statistics are a pair."""
    import torch

    torch.save((torch.zeros(2), torch.ones(2)), tmp_path / "x.th")
    assert {key: value.read().tolist() for key, value in open_tensors(tmp_path / "x.th").items()} == {
        "0": [0, 0],
        "1": [1, 1],
    }
    torch.save({"lr": 0.1}, tmp_path / "x.th")
    assert_error(tmp_path / "x.th", "no named tensors")


class Call:
    """An object whose pickle calls os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@needs_torch
def test_a_torch_file_that_would_run_code(tmp_path):
    import torch

    torch.save({"w": torch.zeros(2), "x": Call(f"touch {tmp_path / 'mark'}")}, tmp_path / "x.pt")
    assert_error(tmp_path / "x.pt", "run code", f"{os.name}.system")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    assert_error(tmp_path / "x.pt", "run code", "torch.nn.modules.linear.Linear")
    assert not (tmp_path / "mark").exists()


@needs_torch
@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_cut_short(tmp_path, zipped):
    import torch

    torch.save({"w": torch.zeros(300)}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    raw = (tmp_path / "x.pt").read_bytes()
    for content in (raw[: len(raw) // 2], b"", b"no pickle, no archive" * 9):
        (tmp_path / "x.pt").write_bytes(content)
        assert_error(tmp_path / "x.pt", "damaged")
