"""Features of a data set in batches: padding, rejected images, names of measures, and CLIP as a feature network."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions

from dalle2_jax import testing
from dalle2_jax.errors import DataError, UserError
from dalle2_jax.evaluation import features
from dalle2_jax.evaluation.features import FeatureNetwork, extract
from dalle2_jax.stages import EmbeddingContract
from dalle2_jax.system import LoadedStage
from dalle2_jax.system.system import System
from dalle2_jax.training.sharding import MeshConfig, make_mesh


def network(name="vgg16", label="VGG16", devices=1):
    """A network whose features are the mean and the maximum of an image; it counts the shapes it is called with."""
    shapes = []

    def encode(images):
        shapes.append(images.shape)
        pixels = jnp.asarray(images, jnp.float32)
        return jnp.stack([pixels.mean((1, 2, 3)), pixels.max((1, 2, 3))], axis=1)

    made = FeatureNetwork(name, label, None, 4, 2, 0, "0", encode, devices=devices)
    return made, shapes


IMAGES = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize("given", [IMAGES, list(IMAGES), iter(IMAGES)], ids=["array", "list", "iterator"])
def test_batches_of_one_shape(given):
    made, shapes = network()
    found = extract(made, given, batch_size=3)
    np.testing.assert_allclose(found, np.stack([IMAGES.mean((1, 2, 3)), IMAGES.max((1, 2, 3))], axis=1), rtol=1e-6)
    assert found.dtype == np.float32 and {*shapes} == {(3, 6, 5, 3)}


def test_a_batch_is_a_multiple_of_the_devices():
    made, shapes = network(devices=4)
    assert extract(made, IMAGES, batch_size=3).shape == (7, 2)
    assert {*shapes} == {(4, 6, 5, 3)}


def nan_image():
    image = IMAGES[0].astype(np.float32)
    image[0, 0, 0] = np.nan
    return image


WRONG = {
    # images, and a part of the message
    "none": ([], ["no images"]),
    "two sizes": ([IMAGES[0], IMAGES[1, :5]], ["image 1", "5x5"]),
    "NaN": ([IMAGES[0], nan_image()], ["image 1", "finite"]),
    "floats": ([np.zeros((6, 5, 3))], ["image 0", "float64"]),
    "grey": ([IMAGES[0, ..., :1]], ["image 0", "shape"]),
    "too small": ([IMAGES[0, :3]], ["4x4"]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_images_that_are_rejected(wrong):
    given, facts = WRONG[wrong]
    with pytest.raises(DataError, check=mentions(*facts)):
        extract(network()[0], given)


def test_only_fid_s_inception_measures_fid():
    inception, vgg = network("inception", "Inception")[0], network()[0]
    assert [inception.measure_name(kind) for kind in ("FD", "KID", "IS")] == ["FID", "KID", "IS"]
    assert [vgg.measure_name(kind) for kind in ("FD", "KID", "IS")] == ["FD-VGG16", "KID-VGG16", "IS-VGG16"]
    assert inception.measure_name("precision") == "precision-Inception"


def test_a_network_without_classes_has_no_logits():
    with pytest.raises(UserError, check=mentions("vgg16", "no classes")):
        network()[0].logits(IMAGES)


def test_a_network_that_is_not_imported(tmp_path):
    with pytest.raises(UserError, check=mentions("dalle2 weights import", tmp_path / "vgg16")):
        features.load(tmp_path / "vgg16")


@pytest.fixture(scope="module")
def clip_system():
    """A system of a tiny CLIP, which crops images that are not square."""
    stage = testing.tiny_stage("clip_vit")
    contract = EmbeddingContract("c0ffee", testing.EMBED_DIM, stage.embedding.normalisation, stage.embedding.scale)
    clip = LoadedStage(stage, testing.tiny_variables(stage), 7, contract, testing.WordTokenizer(), 8)
    return System(Path("runs/nowhere"), {"clip": clip}, make_mesh(MeshConfig()))


def test_clip_is_a_feature_network(clip_system):
    clip = features.load(clip_system)
    assert (clip.name, clip.dims, clip.fingerprint) == ("clip", testing.EMBED_DIM, "c0ffee")
    images = np.random.default_rng(1).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    found = extract(clip, images, batch_size=2)
    np.testing.assert_allclose(found, clip_system.embed_image(images), rtol=1e-4, atol=1e-4)


def test_a_system_without_clip(clip_system):
    with pytest.raises(UserError, check=mentions("no feature network")):
        features.load(System(clip_system.path, {}, clip_system.mesh))
