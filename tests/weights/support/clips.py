"""Helpers for tests of CLIP's formats: runs an imported CLIP as the system runs it, and makes random checkpoints."""

import gzip
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.config.experiment import Experiment
from dalle2_jax.models.clip import Clip
from dalle2_jax.stages import ClipStage
from dalle2_jax.weights.stage_writer import Trees, read_component
from dalle2_jax.weights.tensors import Tensor

FIXTURES = Path(__file__).parents[2] / "fixtures"
FOLDER = FIXTURES / "weights"


def stage_of(component):
    """Returns the stage that a component's config describes, with the vocabulary size of the config."""
    return Experiment.from_config({"stage": "clip", **component.config}).build(
        component.config["text"]["vocab_size"], None
    )


def abstract(stage):
    """Returns the shapes of a stage's variables."""
    return Trees(*jax.eval_shape(stage.init, jax.random.key(0)))


def imported(component, dtype=np.float32):
    """Returns the network's config and its variables, read from the component's tensors."""
    stage = stage_of(component)
    trees = read_component(component, abstract(stage), dtype)
    return stage.model, {"params": trees.params} | ({"batch_stats": trees.stats} if trees.stats else {})


def recorded(path):
    """Returns the arrays of an npz file as attributes, integers as int32."""
    arrays = {key: value.astype(np.int32) if value.dtype == np.int64 else value for key, value in np.load(path).items()}
    return SimpleNamespace(**{key: jnp.asarray(value) for key, value in arrays.items()})


def to_images(normalised, config):
    """Returns images in [-1, 1], [B, H, W, 3], from torch's normalised images [B, 3, H, W]."""
    mean, std = (np.asarray(values, np.float64) for values in (config.image_mean, config.image_std))
    x = np.transpose(np.asarray(normalised, np.float64), (0, 2, 3, 1)) * std + mean
    return jnp.asarray(2 * x - 1, jnp.float32)


def error(ours, theirs):
    """Returns the maximum difference relative to the maximum value."""
    assert ours.shape == theirs.shape
    return float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max())


def forward(config, variables, image, tokens, mask=None):
    """Returns image embeddings, text embeddings, text states and logits."""

    @jax.jit
    def run(variables, image, tokens, mask):
        clip = Clip(config)
        image_emb = clip.apply(variables, image, method=Clip.encode_image)
        text_emb, states = clip.apply(variables, tokens, mask, method=Clip.encode_text)
        units = [emb / jnp.linalg.norm(emb, axis=-1, keepdims=True) for emb in (image_emb, text_emb)]
        logits = jnp.exp(variables["params"]["logit_scale"]) * units[0] @ units[1].T
        return image_emb, text_emb, states, logits

    return run(variables, image, tokens, mask)


def keys_of(name):
    """Returns the published names and shapes of a checkpoint, {key: shape}."""
    lines = gzip.decompress((FIXTURES / "keys" / f"{name}.tsv.gz").read_bytes()).decode().splitlines()
    pairs = (line.split("\t") for line in lines)
    return {key: () if size == "scalar" else tuple(map(int, size.split("x"))) for key, size in pairs}


def shape_only(sizes):
    """Returns {key: Tensor} with the given shapes and no content, to test full-size checkpoints."""
    return {key: Tensor(shape, "float32", Path("shape_only"), None) for key, shape in sizes.items()}


def random_clip(config, seed=0):
    """Returns random parameters and statistics of a CLIP."""
    random = np.random.default_rng(seed)
    trees = jax.eval_shape(ClipStage(config).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), trees.params)
    return Trees(params, jax.tree.map(lambda leaf: random.uniform(0.5, 2, leaf.shape).astype(np.float32), trees.stats))


def assert_same(one, other):
    """Asserts that two trees are equal bit for bit."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def report(capsys, what, **errors):
    """Prints measured errors, even if pytest captures output."""
    with capsys.disabled():
        print(f"\n{what}: " + ", ".join(f"{name} {value:.1e}" for name, value in errors.items()))
