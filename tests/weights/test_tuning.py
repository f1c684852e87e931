"""What was imported is trained on by train.py: whole, or by a LoRA that is saved alone and merged when it is read.

The proof that losses fall on is ``python benchmarks/finetune_karlo.py``: 200 steps of Karlo-tiny's prior and decoder.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import checkpoints
import jax
import numpy as np
import pytest
import sample
from checkpoints import good, take
from command_line import Shop

from dalle2_jax import build
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.weights import __main__ as weights
from dalle2_jax.workdir import Checkpoints, StageFolder

RANK, ALPHA, STEPS = 2, 4.0, 10


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    place = tmp_path_factory.mktemp("karlo")
    return take(place / "system", checkpoints.karlo_five(place / "files"))


@pytest.fixture(scope="module")
def tuned(system, tmp_path_factory):
    """Systems with a tuned prior, and with a LoRA of the decoder."""
    root = tmp_path_factory.mktemp("tuned")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    more = {"prior": (), "decoder": (f"--config.lora={{'rank': {RANK}, 'alpha': {ALPHA}}}",)}
    with ThreadPoolExecutor(2) as pool:
        shop = Shop(environment, pool)

        def train(stage):
            words = ("--config", f"benchmarks/finetune_karlo.py:{stage}", "--workdir", root / stage, *more[stage])
            counts = [f"--config.{name}={STEPS}" for name in ("total_steps", "checkpoint_every")]
            return shop.good("train.py", *words, f"--config.init_from={system}", *counts)

        list(pool.map(train, more))
    return {stage: root / stage for stage in more}


def loaded(root):
    return build.load_system(root, make_mesh(MeshConfig()))


def draw(root, out):
    steps = [word for stage in ("prior", "decoder", "upsampler_1") for word in (f"--{stage}.steps", 2)]
    good(sample, "text2image", "--system", root, "--prompt", "a large red circle", "--num", 1, "--out", out, *steps)
    return (out / "0_0.png").read_bytes()


def test_a_tuned_prior_draws_beside_what_was_imported(system, tuned, tmp_path):
    root = tuned["prior"]
    losses = [json.loads(line)["loss"] for line in (root / "prior" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS and np.mean(losses[-3:]) < np.mean(losses[:3])
    assert [(root / name).is_symlink() for name in ("clip", "prior", "decoder", "upsampler_1")] == [1, 0, 1, 1]
    before, after = loaded(system)["prior"], loaded(root)["prior"]
    assert before.stage == after.stage and before.tokenizer == after.tokenizer
    jax.tree.map(np.testing.assert_array_equal, before.variables.stats, after.variables.stats)  # of whitening
    assert draw(root, tmp_path / "tuned") != draw(system, tmp_path / "untuned")


def test_a_lora_is_small_and_is_merged_when_it_is_read(system, tuned, tmp_path):
    root = tuned["decoder"]
    base, merged = (loaded(place)["decoder"].variables.params for place in (system, root))
    clip = loaded(root)["clip"]
    config = StageFolder(root, "decoder").read_json("config.json")
    stage = build.trained_stage(build.build_stage(config, clip.tokenizer.vocab_size, clip.stage), config)
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=clip.variables.params["logit_scale"].sharding),
        jax.eval_shape(stage.init, jax.random.key(0)).params,
    )
    factors = Checkpoints(StageFolder(root, "decoder")).restore({"ema": target}).trees["ema"]
    count, whole = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (factors, base))
    assert 0 < count < 0.05 * whole
    pairs = {
        tuple(key.key for key in path[:-1]): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(factors)
        if path[-1].key == "lora_a"
    }
    changed = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(merged):
        names, was = tuple(key.key for key in path), at(base, [key.key for key in path])
        if names[-1] == "kernel" and names[:-1] in pairs:
            a, b = np.asarray(pairs[names[:-1]], np.float64), np.asarray(at(factors, names[:-1])["lora_b"], np.float64)
            expected = np.asarray(was, np.float64) + ALPHA / RANK * np.tensordot(a, b, 1)
            np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-7)
            changed += bool((np.asarray(leaf) != np.asarray(was)).any())
        else:
            np.testing.assert_array_equal(leaf, was)
    assert changed == len(pairs) > 0
    draw(root, tmp_path / "out")
    good(weights, "export", "diffusers", root, tmp_path / "folder")  # merged there too
    again = loaded(take(tmp_path / "again", tmp_path / "folder"))["decoder"].variables.params
    jax.tree.map(np.testing.assert_array_equal, again, merged)


def at(tree, names):
    """What lies at a path of a tree."""
    for name in names:
        tree = tree[name]
    return tree
