"""Imported feature networks compute what the published implementations do, from uint8 images on."""

import feature_weights
import jax.numpy as jnp
import numpy as np
import pytest
from feature_weights import RECORDED, images, random_state

from dalle2_jax.evaluation import features, lpips
from dalle2_jax.models.features.dinov2 import Dinov2, Dinov2Config
from dalle2_jax.models.features.vgg import VggClassifier
from dalle2_jax.weights import rules as conversion
from dalle2_jax.weights.features.table import NETWORKS, PublishedNetwork, rules, shapes
from dalle2_jax.weights.importer import import_weights
from dalle2_jax.weights.tensor import Tensor
from dalle2_jax.weights.tensors import write_safetensors

BOUND = 1e-5

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def recorded():
    return dict(np.load(RECORDED))


def published_state(name, rename=lambda key: key):
    """Returns random tensors under the published names of a network."""
    network = NETWORKS[name]
    abstract = shapes(network)
    return random_state(
        {rename(key): shape for key, shape in conversion.shapes(rules(abstract, network.layers), abstract).items()}
    )


def imported(folder, state, kind="auto"):
    """Imports tensors from a safetensors file; returns the folder."""
    file = folder / "published.safetensors"
    write_safetensors(file, {key: value.shape for key, value in state.items()}, state.items())
    (stage,) = import_weights(file, folder / "network", kind=kind).stages
    file.unlink()
    return stage.path


def relative_error(found, expected):
    assert found.shape == expected.shape
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


CASES = {
    # name: images; whether logits are recorded
    "inception": (images(1, 64), True),
    "vgg16": (images(2, 32), False),
    "efficientnet_lite0": (images(2, 96), True),
    "dinov2_vits14": (images(1, 64), False),
}


@pytest.mark.parametrize("name", CASES)
def test_features_are_the_published_ones(tmp_path, recorded, within, name):
    given, classifies = CASES[name]
    network = features.load(imported(tmp_path, published_state(name)))
    found = features.extract(network, given, batch_size=len(given))
    assert found.shape == (len(given), network.dims) and found.dtype == np.float32
    key = f"{name}/features" if classifies or name == "vgg16" else name
    within(f"{name}: features", relative_error(found, recorded[key]), BOUND)
    if classifies:
        logits = network.logits_of(found)
        assert logits.shape == (len(given), network.classes)
        within(f"{name}: logits", relative_error(logits, recorded[f"{name}/logits"]), BOUND)


SLICES = {
    # network: first index of each slice of lpips' modules, size of the recorded images
    "alexnet": ((0, 2, 5, 8, 10), 64, "alex"),
    "vgg16": ((0, 4, 9, 16, 23), 24, "vgg"),
}


@pytest.mark.parametrize("network", SLICES)
def test_lpips_is_the_published_one(tmp_path, recorded, within, network):
    starts, side, theirs = SLICES[network]

    def lpips_name(key):
        if not key.startswith("features."):
            return key
        _, index, last = key.split(".")
        return f"net.slice{sum(int(index) >= start for start in starts)}.{index}.{last}"

    state = published_state(f"lpips_{network}", lpips_name)
    state |= {f"lins.{key[3:]}": value for key, value in state.items() if key.startswith("lin")}
    state["scaling_layer.shift"] = state["scaling_layer.scale"] = np.zeros((1, 3, 1, 1), np.float32)
    distance = lpips.load(imported(tmp_path, state))
    one, other = images(2, side, 1), images(2, side, 2)
    expected = recorded[f"lpips_{theirs}"]
    within(f"LPIPS {network}", relative_error(distance(one, other), expected), BOUND)
    matrix = lpips.distances(distance.embed(one, batch_size=2), distance.embed(other, batch_size=2), block=1)
    within(f"LPIPS {network}: matrix", relative_error(np.diag(matrix), expected), 5 * BOUND)  # cancellation
    assert np.allclose(distance(one, one), 0)


THIN = {
    "vgg16_thin": PublishedNetwork("", VggClassifier((8, 8, 16, 16, 16), 32, 10), 224),
    "dinov2_thin": PublishedNetwork("", Dinov2(Dinov2Config(32, 3, 2)), 56, 3),
}


@pytest.mark.parametrize("name", THIN)
def test_narrow_networks(recorded, within, name):
    """The classifier of VGG16, which has 124 million weights, and the scaled position embeddings of DINOv2."""
    network, layer = THIN[name], dict(images=224 if name == "vgg16_thin" else 56)
    abstract = shapes(network)
    table = rules(abstract, network.layers)
    state = random_state(conversion.shapes(table, abstract))
    tensors = {key: Tensor(each.shape, "float32", RECORDED, lambda each=each: each) for key, each in state.items()}
    variables = conversion.from_tensors(table, tensors, abstract, name)
    given = (images(2, layer["images"]) / np.float32(255) - features_mean()) / features_std()
    found = network.module.apply(variables, jnp.asarray(given, jnp.float32))
    if name == "dinov2_thin":
        within(name, relative_error(found.features, recorded[name]), BOUND)
    else:
        within(f"{name}: fc7", relative_error(found.features, recorded[f"{name}/fc7"]), BOUND)
        within(f"{name}: logits", relative_error(found.logits, recorded[f"{name}/logits"]), BOUND)


def features_mean():
    return np.asarray([0.485, 0.456, 0.406], np.float32)


def features_std():
    return np.asarray([0.229, 0.224, 0.225], np.float32)


def test_recordings_are_complete(recorded):
    assert feature_weights.RECORDED.stat().st_size < 100_000
    assert all(np.isfinite(value).all() for value in recorded.values())
