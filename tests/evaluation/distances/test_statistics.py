"""Mean and covariance from a stream, and the file that holds them: round trip, damage, hostile content."""

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
from hostile_files import npy, pickled
from raised import mentions

from dalle2_jax.errors import DataError
from dalle2_jax.evaluation.distances import Moments, Origin, Statistics, blocks

FEATURES = (np.random.default_rng(0).normal(size=(37, 5)) * [1, 2, 3, 4, 0.1] + 1000).astype(np.float32)
ORIGIN = Origin("vgg16", "0123abcd", "64x64", "digits")


@pytest.mark.parametrize("size", [1, 2, 10, 37])
def test_moments_of_any_batches(size, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4)
    moments = Moments()
    for start in range(0, len(FEATURES), size):
        moments.update(FEATURES[start : start + size])
    moments.update(FEATURES[:0])
    found, exact = moments.statistics(ORIGIN), FEATURES.astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)
    assert (found.n, found.dim, found.origin) == (37, 5, ORIGIN)


def test_statistics_are_a_copy():
    moments = Moments()
    moments.update(FEATURES)
    before = moments.statistics()
    moments.update(FEATURES + 1)
    np.testing.assert_array_equal(before.mean, Statistics.of(FEATURES).mean)


WRONG_FEATURES = {
    "NaN": ([[1.0, 2.0], [3.0, np.nan]], ["image 1", "finite"]),
    "infinity": ([[np.inf, 2.0]], ["image 0", "finite"]),
    "a vector": ([1.0, 2.0], ["matrix"]),
    "integers": ([[1, 2]], ["matrix"]),
    "no columns": (np.zeros((3, 0)), ["matrix"]),
    "one image": ([[1.0, 2.0]], ["2 images", 1]),
}


@pytest.mark.parametrize("wrong", WRONG_FEATURES)
def test_features_that_are_rejected(wrong):
    features, facts = WRONG_FEATURES[wrong]
    with pytest.raises(DataError, check=mentions(*facts)):
        Statistics.of(np.asarray(features))


def test_batches_of_two_networks():
    moments = Moments()
    moments.update(FEATURES)
    with pytest.raises(DataError, check=mentions(3, 5)):
        moments.update(FEATURES[:, :3])


# --- the file -----------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "digits.npz"
    Statistics.of(FEATURES, ORIGIN).save(path)
    return path


def test_a_file_has_every_bit(path):
    saved, found = Statistics.of(FEATURES, ORIGIN), Statistics.load(path)
    np.testing.assert_array_equal(found.mean, saved.mean)
    np.testing.assert_array_equal(found.covariance, saved.covariance)
    assert (found.n, found.origin) == (37, ORIGIN)
    assert found.mean.flags.writeable and path.stat().st_size < 2500


def test_a_file_is_the_same_bytes_again(path, tmp_path):
    Statistics.load(path).save(tmp_path / "again.npz")
    assert path.read_bytes() == (tmp_path / "again.npz").read_bytes()


def test_numpy_and_pytorch_fid_read_a_file(path):
    with np.load(path) as file:
        np.testing.assert_array_equal(file["mu"], Statistics.load(path).mean)
        assert file["sigma"].shape == (5, 5)


def test_a_file_of_another_network(path):
    Statistics.load(path, Origin("vgg16", "0123abcd", "64x64", "samples"))
    with pytest.raises(DataError, check=mentions("fingerprint", "'0123abcd'")) as raised:
        Statistics.load(path, Origin("vgg16", "ffff", "64x64"))
    assert raised.value.path == path


def saved(array):
    stream = io.BytesIO()
    np.save(stream, np.asarray(array))
    return stream.getvalue()


def described(text):
    return saved(np.frombuffer(text.encode(), np.uint8))


def header(text):
    """A .npy file of three numbers whose header is a text."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(24)


DESCRIPTION = {"n": 9, "network": "a", "fingerprint": "b", "preparation": "c", "data": "d"}
MEMBERS = {
    "mu.npy": saved(np.zeros(2)),
    "sigma.npy": saved(np.eye(2)),
    "description.npy": described(json.dumps(DESCRIPTION)),
}

HOSTILE = {
    "objects, pickled": {"mu.npy": pickled()},
    "a pickle": {"mu.npy": pickle.dumps([1])},
    "a shape without its bytes": {"sigma.npy": npy((16_000, 16_000), "<f8")},
    "a shape far too large": {"sigma.npy": npy((10**12, 10**12), "<f8")},
    "a negative shape": {"mu.npy": npy((-2,), "<f8")},
    "a header that is code": {"mu.npy": header("print(1)")},
    "an open bracket": {"mu.npy": header("(((")},
    "an open string": {"mu.npy": header("'''")},
    "a deep header": {"mu.npy": header("-" * 9000 + "1")},
    "an endless header": {"mu.npy": header("(" * 65535)},
    "a header of Python 2": {"mu.npy": header("{'descr': '<f8', 'fortran_order': False, 'shape': (2L,)}")},
    "a shape of truth values": {"mu.npy": header("{'descr': '<f8', 'fortran_order': False, 'shape': (True,)}")},
    "single precision": {"mu.npy": saved(np.zeros(2, np.float32))},
    "a matrix for a mean": {"mu.npy": saved(np.zeros((2, 1)))},
    "sizes that differ": {"sigma.npy": saved(np.eye(3))},
    "NaN": {"mu.npy": saved([0.0, np.nan])},
    "no member": {"mu.npy": None},
    "no JSON": {"description.npy": described("{")},
    "deep JSON": {"description.npy": described("[" * 9000)},
    "a list": {"description.npy": described("[]")},
    "no n": {"description.npy": described(json.dumps({**DESCRIPTION, "n": None}))},
    "n that is no number": {"description.npy": described(json.dumps({**DESCRIPTION, "n": True}))},
    "a name that is no text": {"description.npy": described(json.dumps({**DESCRIPTION, "network": 1}))},
    "a missing field": {"description.npy": described(json.dumps({"n": 9}))},
    "a long description": {"description.npy": described(json.dumps({**DESCRIPTION, "data": "d" * 10_000}))},
}


def write(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)
    return path


def test_a_file_by_hand(tmp_path):
    assert Statistics.load(write(tmp_path / "f.npz", MEMBERS)).origin == Origin("a", "b", "c", "d")


@pytest.mark.parametrize("wrong", HOSTILE)
def test_hostile_files(wrong, tmp_path):
    path = write(tmp_path / "f.npz", {**MEMBERS, **HOSTILE[wrong]})
    with pytest.raises(DataError) as raised:
        Statistics.load(path)
    assert raised.value.path == path and "\n" not in str(raised.value)


def test_compressed_files_are_not_expanded(tmp_path):
    bomb = {**MEMBERS, "sigma.npy": npy((1000, 1000), "<f8") + bytes(8_000_000)}
    path = write(tmp_path / "f.npz", bomb, zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, check=mentions("too large")) as raised:
        Statistics.load(path)
    assert raised.value.path == path


@pytest.mark.parametrize("damage", ["cut", "one bit", "empty", "text", "folder", "missing"])
def test_damaged_files(damage, path):
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "one bit":
        content[400] ^= 1
        path.write_bytes(content)
    elif damage in ("empty", "text"):
        path.write_text("" if damage == "empty" else "no archive" * 20)
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    with pytest.raises(DataError) as raised:
        Statistics.load(path)
    assert raised.value.path == path and "\n" not in str(raised.value)
