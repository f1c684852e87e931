"""Hostile weights files: one error line that names the file, before much is read or allocated."""

import json
import os
import pickle
import struct
import time
import zipfile

import hostile
import pytest
from raised import mentions

from dalle2_jax.errors import WeightsError
from dalle2_jax.weights.config_files import MAX_BYTES, read_json
from dalle2_jax.weights.tensors import open_tensors

# --- files ----------------------------------------------------------------------------------


def test_a_file_of_a_gigabyte_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    os.truncate(path, 2**30)
    start = time.process_time()
    with pytest.raises(WeightsError, check=mentions("1,073,741,824 bytes", path=path)):
        read_json(path)
    assert time.process_time() - start < 0.1
    path.write_text(json.dumps({"x": "y" * (MAX_BYTES // 2)}))
    assert read_json(path)["x"].startswith("y")


INDEXES = {
    # invalid values of weight_map
    "itself": {"a": "model.safetensors.index.json"},
    "above": {"a": "../model.safetensors"},
    "a path": {"a": "/etc/passwd"},
    "a folder": {"a": ".."},
    "no weights": {"a": "config.json"},
    "a number": {"a": 3},
    "a list": ["model.safetensors"],
    "null": None,
    "empty": {},
    "a null byte": {"a": "x\0.safetensors"},
}


@pytest.mark.parametrize("wrong", INDEXES)
def test_an_index_may_only_name_files_in_its_folder(tmp_path, wrong):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": INDEXES[wrong]}))
    with pytest.raises(WeightsError, check=mentions(path, "weight_map", path=path)):
        open_tensors(path)


NO_INDEX = ("[]", "3", "{", hostile.DEEP, '{"weight_map": NaN}', "")


@pytest.mark.parametrize("content", NO_INDEX, ids=lambda text: text[:9])
def test_an_invalid_index(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(WeightsError, check=mentions(path, path=path)):
        open_tensors(path)


def test_a_part_that_is_missing_is_named(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(WeightsError, check=mentions(path=tmp_path / "model-1.safetensors")):
        open_tensors(path)


def header(**entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


F32 = {"dtype": "F32", "shape": [4]}
HEADERS = {
    "a header of exabytes": struct.pack("<Q", 2**62) + b"{}",
    "a header past the end": struct.pack("<Q", 10**6) + b"{}",
    "nothing": b"",
    "seven bytes": b"\0" * 7,
    "no JSON": struct.pack("<Q", 8) + b"notjson!",
    "a tensor past the end": header(a={**F32, "data_offsets": [0, 2**60]}),
    "overlapping tensors": header(a={**F32, "data_offsets": [0, 16]}, b={**F32, "data_offsets": [8, 24]}),
    "a shape of another size": header(a={"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]}),
    "a shape below zero": header(a={"dtype": "F32", "shape": [-4], "data_offsets": [0, 64]}),
    "offsets backwards": header(a={**F32, "data_offsets": [16, 0]}),
    "an unknown dtype": header(a={"dtype": "F7", "shape": [16], "data_offsets": [0, 64]}),
    "nested deep": struct.pack("<Q", 100_000) + b"[" * 100_000,
}


@pytest.mark.parametrize("wrong", HEADERS)
def test_an_invalid_safetensors_header(tmp_path, wrong):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[wrong])
    with pytest.raises(WeightsError, check=mentions(path, "damaged", path=path)):
        open_tensors(path)


# --- archives -------------------------------------------------------------------------------


class Reduced:
    """An object whose pickle calls any function or class by name."""

    def __init__(self, module, name, arguments, state=None):
        self.module, self.name, self.arguments, self.state = module, name, arguments, state


class _Pickler(pickle._Pickler):
    """Pickles `Reduced` objects, whose names need not exist."""

    def save(self, value, save_persistent_id=True):
        if not isinstance(value, Reduced) or id(value) in self.memo:
            return super().save(value, save_persistent_id)
        self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        super().save(value.arguments)
        self.write(pickle.REDUCE)
        self.memoize(value)
        if value.state is not None:
            super().save(value.state)
            self.write(pickle.BUILD)


def archive(path, description, compression=zipfile.ZIP_STORED, **records):
    """Writes a TorchScript archive of a pickle and of records by name."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/constants.pkl", b"")
        file.writestr("x/data.pkl", description)
        for name, content in records.items():
            file.writestr(f"x/data/{name}", content)
    return path


def pickled(path, value):
    """Returns the pickle of a value."""
    with path.open("wb") as file:
        _Pickler(file, 2).dump(value)
    return path.read_bytes()


def test_an_archive_that_unpacks_to_a_thousand_times_its_size(tmp_path):
    path = archive(tmp_path / "bomb.pt", bytes(2**24), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**16
    with pytest.raises(WeightsError, check=mentions("16,777,216 bytes", path=path)):
        open_tensors(path)


def test_a_memo_that_claims_gigabytes(tmp_path):
    description = b"\x80\x02N" + pickle.LONG_BINPUT + struct.pack("<I", 2**32 - 1) + b"."
    start = time.process_time()
    assert open_tensors(archive(tmp_path / "memo.pt", description)) == {}
    long = b"\x80\x04" + pickle.BINBYTES8 + struct.pack("<Q", 2**40) + b"."
    with pytest.raises(WeightsError, check=mentions("damaged", path=tmp_path / "long.pt")):
        open_tensors(archive(tmp_path / "long.pt", long))
    assert time.process_time() - start < 1


def test_an_exponential_number_of_modules(tmp_path):
    """Forty modules, each twice in the next, have 2^40 names."""
    module = Reduced("__torch__", "M", (), {"end": 1})
    for _ in range(40):
        module = Reduced("__torch__", "M", (), {"one": module, "other": module})
    start = time.process_time()
    with pytest.raises(WeightsError, check=mentions("200,000 modules", path=tmp_path / "shared.pt")):
        open_tensors(archive(tmp_path / "shared.pt", pickled(tmp_path / "pickle", module)))
    assert time.process_time() - start < 3


def test_a_tensor_that_repeats_one_element(tmp_path):
    """A stride of 0 would expand four bytes to petabytes."""
    rest = pickle.GLOBAL + b"__torch__\nM\n" + b")" + pickle.REDUCE + b"}" + b"X\x01\x00\x00\x00a"
    tensor = pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n(("
    tensor += b"X\x07\x00\x00\x00storage" + pickle.GLOBAL + b"torch\nFloatStorage\n" + b"X\x01\x00\x00\x000tQ"
    tensor += b"K\x00(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft(K\x00K\x00ttR"
    path = archive(tmp_path / "wide.pt", b"\x80\x02" + rest + tensor + b"sb.", **{"0": bytes(4)})
    with pytest.raises(WeightsError, check=mentions("tensor a", "444 bytes", path=path)):
        open_tensors(path)
