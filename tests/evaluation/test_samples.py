"""Samples on disk: shards of one size that an interrupted run continues, of one set of settings."""

import json
import threading

import numpy as np
import pytest
from evaluated_system import network

from dalle2_jax.errors import ConfigError, DataError
from dalle2_jax.evaluation.samples import SETTINGS, SampleFolder, at, difference, folder_name

CAPTIONS = [f"caption {number}" for number in range(10)]
SETTINGS_OF = {"seed": 1, "sampling": {"decoder": {"steps": 4}}}


class Interruption(Exception):
    pass


class Generate:
    """Images that depend on the number of the caption; fails at the batch that begins with ``fail``."""

    def __init__(self, fail=None):
        self.fail, self.calls = fail, []

    def __call__(self, first, captions):
        if first == self.fail:
            raise Interruption
        self.calls.append((first, len(captions)))
        return np.stack([np.full((4, 4, 3), first + place, np.uint8) for place in range(len(captions))])


def folder(path, **settings):
    return SampleFolder(path, {**SETTINGS_OF, **settings}, 4, 4)


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_batches_have_one_size_and_images_follow_their_captions(tmp_path):
    samples, generate = folder(tmp_path), Generate()
    samples.fill(CAPTIONS, generate)
    assert generate.calls == [(0, 4), (4, 4), (8, 4)] and len(samples) == 10
    assert samples.images()[:, 0, 0, 0].tolist() == [*range(10)]
    assert samples.images(5).shape == (5, 4, 4, 3)
    assert json.loads((tmp_path / "00002.json").read_text()) == CAPTIONS[8:]


def test_an_interrupted_run_continues_to_the_same_files(tmp_path):
    folder(tmp_path / "whole").fill(CAPTIONS, Generate(), [network()])
    with pytest.raises(Interruption):
        folder(tmp_path / "parts").fill(CAPTIONS, Generate(fail=4), [network()])
    generate = Generate()
    folder(tmp_path / "parts").fill(CAPTIONS, generate, [network()])
    assert generate.calls == [(4, 4), (8, 4)]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_more_captions_generate_the_missing_images_only(tmp_path):
    folder(tmp_path).fill(CAPTIONS[:6], Generate(), [network()])
    generate, samples = Generate(), folder(tmp_path)
    samples.fill(CAPTIONS, generate, [network()])
    assert generate.calls == [(4, 4), (8, 4)]  # the shard of two images is completed
    assert samples.images()[:, 0, 0, 0].tolist() == [*range(10)]
    assert samples.features(network()).shape == (10, 4)
    generate, samples = Generate(), folder(tmp_path)
    samples.fill(CAPTIONS[:3], generate)
    assert not generate.calls and len(samples.images()) == 3


def test_features_are_computed_by_another_thread_once(tmp_path):
    seen, threads = [], []
    known = network(seen=seen)
    encode = known.encode

    def observed(images):
        threads.append(threading.current_thread().name)
        return encode(images)

    object.__setattr__(known, "encode", observed)
    samples = folder(tmp_path)
    samples.fill(CAPTIONS, Generate(), [known])
    assert seen == [4, 4, 4] and {name.partition("_")[0] for name in threads} == {"features"}
    expected = network().encode(samples.images())
    np.testing.assert_allclose(samples.features(known), expected, rtol=1e-6)
    assert seen == [4, 4, 4]  # read from disk


def test_an_error_of_the_network_ends_sampling(tmp_path):
    def fail(images):
        raise Interruption

    broken = network()
    object.__setattr__(broken, "encode", fail)
    with pytest.raises(Interruption):
        folder(tmp_path).fill(CAPTIONS, Generate(), [broken])


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"seed": 2}, "seed"),
        ({"sampling": {"decoder": {"steps": 5}}}, "sampling.decoder.steps"),
        ({"sampling": {"decoder": {"steps": 4, "eta": 1.0}}}, "sampling.decoder.eta"),
        ({"sampling": {}}, "sampling.decoder"),
        ({"prior": None}, "prior"),
    ],
)
def test_other_settings_are_rejected_by_name(tmp_path, changed, field):
    folder(tmp_path).fill(CAPTIONS, Generate())
    with pytest.raises(ConfigError) as error:
        folder(tmp_path, **changed)
    assert error.value.field == field and str(tmp_path) in str(error.value)


def test_other_captions_are_rejected(tmp_path):
    folder(tmp_path).fill(CAPTIONS, Generate())
    with pytest.raises(ConfigError) as error:
        folder(tmp_path).fill(CAPTIONS[::-1], Generate())
    assert error.value.field == "data"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (SETTINGS, "{"),
        (SETTINGS, "[]"),
        ("00000.json", "{}"),
        ("00000.json", "\0"),
        ("00001.npy", "no array"),
        ("00001.npy", np.zeros((4, 4, 4, 3), np.float32)),
        ("00001.npy", np.zeros((4, 5, 4, 3), np.uint8)),
        ("00001.npy", np.zeros((4, 400, 400, 3), np.uint8)),
        ("00001.npy", np.array([{}], object)),
    ],
)
def test_damaged_files_are_named(tmp_path, file, content):
    folder(tmp_path).fill(CAPTIONS, Generate())
    if isinstance(content, str):
        (tmp_path / file).write_text(content)
    else:
        np.save(tmp_path / file, content, allow_pickle=True)
    with pytest.raises(DataError) as error:
        samples = folder(tmp_path)
        samples.fill(CAPTIONS, Generate())
        samples.images()
    assert error.value.path == tmp_path / file


def test_damaged_features_are_computed_again(tmp_path):
    samples, known = folder(tmp_path), network()
    samples.fill(CAPTIONS, Generate(), [known])
    expected = samples.features(known)
    np.save(tmp_path / "vgg16-feed" / "00000.npy", np.zeros((3, 4), np.float32))
    np.testing.assert_array_equal(samples.features(known), expected)


def test_a_fingerprint_is_no_path(tmp_path):
    """It comes from the file of an imported network."""
    known = network()
    object.__setattr__(known, "fingerprint", "../../../etc/x")
    assert folder_name(known) == "vgg16-_________etc_x"


def test_temporary_files_of_killed_runs_are_removed(tmp_path):
    folder(tmp_path).fill(CAPTIONS, Generate(), [network()])
    for where in (tmp_path, tmp_path / "vgg16-feed"):
        (where / ".00001.npy.0123456789abcdef.part").write_text("half")
    folder(tmp_path)
    assert not [*tmp_path.rglob("*.part")]


def test_difference_and_at_go_into_objects():
    settings = {"a": {"b": [1, 2]}, "c": None}
    assert difference(settings, settings) is None and at(settings, "a.b") == [1, 2] and at(settings, "c.d") is None
    assert difference(settings, {"a": {"b": [1, 3]}, "c": None}) == "a.b"
    assert difference(settings, {"a": {"b": [1, 2]}}) == "c"
