"""Import of LAION's prior: sizes from shapes, the table in both directions, and copies of the network in a file."""

import re
import sys
import types
from dataclasses import fields
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import WeightsError
from dalle2_jax.models.priors.laion_prior import LaionPriorConfig, LaionPriorNetwork
from dalle2_jax.weights.families.laion import IGNORED, laion_rules, laion_sizes, select_tensors
from dalle2_jax.weights.rules import from_tensors, to_tensors
from dalle2_jax.weights.tensors import open_tensors

FIXTURES = Path(__file__).parents[2] / "fixtures" / "models"

CONFIGS = {
    "laion_prior": LaionPriorConfig(24, 2, 3, 36, 96, 20, 60),
    "laion_prior_padding": LaionPriorConfig(
        *(16, 3, 2, 10, 32, 12, None, 2, 2, 3),
        normformer=False,
        norm_in=True,
        nulls="padding",
        attention="relaxed",
    ),
    "laion_prior_hidden": LaionPriorConfig(
        *(16, 1, 2, 10, 64, 77, 7), normformer=False, rotary=False, final_proj=False, nulls="hidden", attention="dot"
    ),
}


def file(name):
    return open_tensors(FIXTURES / f"{name}.safetensors")


def shapes(config):
    x, t = jnp.zeros((1, config.width)), jnp.zeros(1, jnp.int32)
    text = jnp.zeros((1, config.context_length, config.width)), jnp.ones((1, config.context_length), bool)
    return jax.eval_shape(LaionPriorNetwork(config).init, jax.random.key(0), x, t, x, *text)["params"]


def imported(tensors, config):
    return from_tensors(laion_rules(config), select_tensors(tensors, "prior.pth"), shapes(config), "prior.pth", IGNORED)


@pytest.fixture(scope="module", params=CONFIGS)
def recorded(request):
    return file(request.param), CONFIGS[request.param]


def test_sizes_are_read_from_shapes(recorded):
    tensors, config = recorded
    sizes = laion_sizes(select_tensors(tensors, "prior.pth"), "prior.pth")
    assert LaionPriorConfig(**sizes) == config
    not_shown = {"remat", "dtype"} | ({"context_length"} if config.nulls == "hidden" else set())
    assert {*sizes} == {field.name for field in fields(config)} - not_shown


def test_export_inverts_import(recorded):
    tensors, config = recorded
    back = dict(to_tensors(laion_rules(config), imported(tensors, config)))
    network = {key.removeprefix("net."): value for key, value in tensors.items() if key.startswith("net.")}
    left = {key for key in network if any(re.fullmatch(form, key) for form in IGNORED)}
    assert {*back} == {*network} - left
    assert all(key.endswith(("rotary_emb.freqs", ".beta")) for key in left)
    for key, value in back.items():
        np.testing.assert_array_equal(value, network[key].read())


def test_swapped_tensors_change_the_converted_leaves(recorded):
    """Every tensor of the table determines a separate part of a leaf."""
    tensors, config = recorded
    rules = laion_rules(config)
    keys = [key for rule in rules for key in rule.keys]
    marked = {
        f"net.{key}": tensors[f"net.{key}"]._replace(read=lambda i=i, key=key: np.full(tensors[f"net.{key}"].shape, i))
        for i, key in enumerate(keys)
    }
    for i, (key, value) in enumerate(to_tensors(rules, imported(marked, config))):
        assert key == keys[i] and (value == i).all()


def test_averaged_weights_are_preferred():
    tensors, config = file("laion_prior"), CONFIGS["laion_prior"]
    halved = {key: t._replace(read=lambda t=t: t.read() / 2) for key, t in tensors.items()}
    ema = {f"ema_model.{key}": t for key, t in halved.items()}
    ema |= {f"online_model.{key}": t for key, t in tensors.items()}
    others = {"clip.clip.logit_scale": tensors["net.learned_query"], "initted": tensors["net.learned_query"]}
    for content, scale in (
        (ema | tensors | others, 0.5),
        ({key: ema[key] for key in ema if key.startswith("ema")} | {"step": tensors["net.learned_query"]}, 0.5),
        (tensors | others, 1.0),
        ({key.removeprefix("net."): t for key, t in tensors.items() if key.startswith("net.")}, 1.0),
    ):
        assert laion_sizes(select_tensors(content, "prior.pth"), "prior.pth")["layers"] == 2
        query = imported(content, config)["query"]
        np.testing.assert_array_equal(query, tensors["net.learned_query"].read() * scale)


def test_published_sizes():
    """The example of the library, and that of its configuration file, which has the size of LAION's published file."""

    def count(config):
        return sum(leaf.size for leaf in jax.tree.leaves(shapes(config)))

    layer = 2 * 768 * 2048 + 768 * 128 + 128 + 3 * 768 * 3072 + 3 * 768 + 3072
    others = 1000 * 768 + 768 + 32 * 32 + 768 + 768 * 768 + 79 * 768
    assert count(LaionPriorConfig()) == 24 * layer + others
    small = LaionPriorConfig(layers=12, heads=12, nulls="padding", attention="relaxed")
    assert count(small) == 12 * (layer - 2 * 768 * (2048 - 768)) + others - 32 * 20 - 2 * 768


def test_the_attention_can_be_given():
    tensors = select_tensors(file("laion_prior_padding"), "prior.pth")
    assert laion_sizes(tensors, "prior.pth", "cosine")["attention"] == "cosine"


@pytest.mark.parametrize("key", ["net.learned_query", "net.causal_transformer.layers.0.0.null_kv"])
def test_another_family_is_rejected(key):
    tensors = file("laion_prior")
    del tensors[key]
    with pytest.raises(WeightsError, check=mentions(key.removeprefix("net."), path="prior.pth")):
        laion_sizes(select_tensors(tensors, "prior.pth"), "prior.pth")


def test_intermediate_versions_are_rejected():
    tensors = {key.replace(".gamma", ".g"): t for key, t in file("laion_prior_hidden").items()}
    with pytest.raises(WeightsError, check=mentions("DALLE2-pytorch", "0.16.0", "0.23.0", path="prior.pth")):
        laion_sizes(select_tensors(tensors, "prior.pth"), "prior.pth")


def test_missing_unexpected_and_misshapen_tensors_are_named():
    tensors, config = file("laion_prior"), CONFIGS["laion_prior"]
    key = "net.causal_transformer.layers.1.0.to_kv.weight"
    lost = "causal_transformer.layers.1.0.to_kv.weight"
    with pytest.raises(WeightsError, check=mentions(lost, path="prior.pth", missing=(lost,))):
        imported({name: t for name, t in tensors.items() if name != key}, config)
    for extra in ("net.extra", "decoder.extra"):
        unexpected = (extra.removeprefix("net."),)
        with pytest.raises(WeightsError, check=mentions(path="prior.pth", unexpected=unexpected)):
            imported(tensors | {extra: tensors[key]}, config)
    for shape in ((71, 24), (72, 23), (36, 24)):
        short = tensors[key]._replace(shape=shape, read=lambda shape=shape: np.zeros(shape, np.float32))
        with pytest.raises(WeightsError, check=mentions("laion_prior.safetensors", lost, [*shape])):
            imported(tensors | {key: short}, config)


@pytest.mark.parametrize("averaged", [True, False])
def test_a_trainers_file_is_read_in_spite_of_its_version(averaged, tmp_path):
    """DALLE2-pytorch writes its version as an object of the library ``packaging``, then the state dicts."""
    torch = pytest.importorskip("torch")
    content = {name: type(name, (), {"__module__": "packaging.version"}) for name in ("Version", "_Version")}
    version = content["Version"]()
    version.__dict__["_version"] = "1.0.0"
    tensors = {key: torch.from_numpy(np.array(tensor.read())) for key, tensor in file("laion_prior").items()}
    saved = {"version": version, "step": torch.tensor([7]), "model": {key: 2 * t for key, t in tensors.items()}}
    saved |= {"ema_model": tensors} if averaged else {}
    module = types.ModuleType("packaging.version")
    vars(module).update(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "packaging.version", module)
        torch.save(saved, tmp_path / "latest.pth")
    query = imported(open_tensors(tmp_path / "latest.pth"), CONFIGS["laion_prior"])["query"]
    np.testing.assert_array_equal(query, tensors["net.learned_query"].numpy() * (1 if averaged else 2))
