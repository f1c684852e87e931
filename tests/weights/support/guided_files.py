"""Files with guided-diffusion's tensor names, made from recorded names and shapes; shared by several tests.

Tiny checkpoints were recorded with random weights that are generated from the names, so they need not be stored.
"""

import gzip
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.config.experiment import Experiment
from dalle2_jax.models.decoder import DecoderNetwork
from dalle2_jax.models.unet import UNet, UNetConfig
from dalle2_jax.weights.component import Source
from dalle2_jax.weights.rules import check, to_tensors
from dalle2_jax.weights.stage_writer import Trees, read_component
from dalle2_jax.weights.tensors import Tensor

FIXTURES = Path(__file__).parents[2] / "fixtures"
SEEDS = {"glide_text2im_tiny": 501, "glide_superres_tiny": 502, "guided_adm_unet_tiny": 500}


def shapes(name):
    """Returns the names and shapes of a file's tensors."""
    lines = gzip.decompress((FIXTURES / "keys" / f"{name}.tsv.gz").read_bytes()).decode().splitlines()
    rows = [line.split("\t") for line in lines]
    return {row[0]: tuple(int(side) for side in row[1].split("x")) for row in rows}


def weight(key, shape, seed):
    """Returns a tensor as it was generated for the recording."""
    noise = np.random.default_rng([seed, zlib.crc32(key.encode())]).standard_normal(shape)
    if key.endswith("bias"):
        value = 0.1 * noise
    elif len(shape) == 1:
        value = 1 + 0.2 * noise
    elif "_embedding" in key:
        value = 0.5 * noise
    else:
        value = noise * np.prod(shape[1:]) ** -0.5
    return value.astype(np.float32)


def tiny(name):
    """Returns a recorded checkpoint's tensors."""
    return {key: weight(key, shape, SEEDS[name]) for key, shape in shapes(name).items()}


def random_tensors(rules, model, seed=7):
    """Returns random tensors for a network with the model's shapes."""
    if isinstance(model, UNetConfig):
        network, unet, conditioning = UNet(model), model, ()
    else:
        network, unet = DecoderNetwork(model), model.unet
        conditioning = (None, None, model.text_length and jnp.zeros((1, model.text_length), jnp.int32))
    x = jnp.zeros((1, unet.image_size, unet.image_size, unet.in_channels))
    params = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(1, jnp.int32), *conditioning)["params"]
    zero_params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)
    return {key: weight(key, value.shape, seed) for key, value in to_tensors(rules, zero_params)}


def source(tensors, name="file.pt"):
    """Returns a file's tensors from arrays, or from shapes (tensors of zeros)."""

    def tensor(value):
        array = np.broadcast_to(np.float32(0), value) if isinstance(value, tuple) else value
        return Tensor(array.shape, "F32", Path(name), lambda: array)

    return Source(Path(name), {key: tensor(value) for key, value in tensors.items()})


def recorded(name):
    """Returns the recorded outputs for a tiny checkpoint, images as [B, H, W, C] and integers as int32."""
    arrays = np.load(FIXTURES / "weights" / f"{name}.npz")
    kinds = {np.dtype(np.int64): np.int32}
    plain = {key: value.astype(kinds.get(value.dtype, value.dtype)) for key, value in arrays.items()}
    return {key: jnp.asarray(v.transpose(0, 2, 3, 1) if v.ndim == 4 else v) for key, v in plain.items()}


def error(ours, theirs):
    """Returns the maximum difference relative to the maximum value."""
    assert ours.shape == theirs.shape
    return float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max())


def stage_of(component):
    """Returns the stage that a component's config describes."""
    vocab_size = component.config.get("text", {}).get("vocab_size")
    return Experiment.from_config({"stage": component.stage, **component.config}).build(vocab_size, None)


def abstract(stage):
    """Returns the shapes of a stage's variables."""
    return Trees(*jax.eval_shape(stage.init, jax.random.key(0)))


def imported(component, stage=None):
    """Returns a component's parameters."""
    return read_component(component, abstract(stage or stage_of(component))).params


def check_table(component, stage):
    """Asserts that a table has the published names and shapes; returns the number of parameters."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract(stage).params)
    expected = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
    check(component.params, component.tensors, expected, component.where)
    for rule in component.params:
        for group in rule.groups:
            joined = rule.layout.join([component.tensors[key].read() for key in group])
            assert joined.shape == expected[rule.path][rule.stacked :], rule.path
        assert not rule.stacked or len(rule.groups) == expected[rule.path][0]
    return sum(int(np.prod(shape)) for shape in expected.values())
