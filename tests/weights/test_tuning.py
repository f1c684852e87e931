"""Fine-tuning of an imported system by train.py: all weights, or a LoRA, which is merged when it is loaded.

Falling losses are shown by ``python benchmarks/finetune_karlo.py``: 200 steps of Karlo-tiny's prior and decoder.
"""

import json

import checkpoints
import jax
import numpy as np
import pytest
from checkpoints import import_into, run_ok
from command_line import InProcessRunner

from dalle2_jax.cli import sample
from dalle2_jax.cli import weights as weights
from dalle2_jax.config.stored import stored_experiment
from dalle2_jax.system import load
from dalle2_jax.training.sharding import (
    MeshConfig,
    make_mesh,
    tree_shardings,
    with_shardings,
)
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.folder import StageFolder

RANK, ALPHA, STEPS = 2, 4.0, 10


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    place = tmp_path_factory.mktemp("karlo")
    return import_into(place / "system", checkpoints.karlo_five(place / "files"))


@pytest.fixture(scope="module")
def tuned(system, tmp_path_factory):
    """Returns a system with a tuned prior, and one with a LoRA of the decoder."""
    root = tmp_path_factory.mktemp("tuned")
    more = {"prior": (), "decoder": (f"--config.lora={{'rank': {RANK}, 'alpha': {ALPHA}}}",)}
    for stage in more:
        words = ("--config", f"benchmarks/finetune_karlo.py:{stage}", "--workdir", root / stage, *more[stage])
        counts = [f"--config.{name}={STEPS}" for name in ("total_steps", "checkpoint_every")]
        InProcessRunner().run_ok("train.py", *words, f"--config.init_from={system}", *counts)
    return {stage: root / stage for stage in more}


def loaded(root):
    return load.load_system(root, make_mesh(MeshConfig()))


def sample_image(root, out):
    steps = [word for stage in ("prior", "decoder", "upsampler_1") for word in (f"--{stage}.steps", 2)]
    run_ok(sample, "text2image", "--system", root, "--prompt", "a large red circle", "--num", 1, "--out", out, *steps)
    return (out / "0_0.png").read_bytes()


def test_a_tuned_prior_works_with_the_imported_stages(system, tuned, tmp_path):
    root = tuned["prior"]
    losses = [json.loads(line)["loss"] for line in (root / "prior" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS and np.mean(losses[-3:]) < np.mean(losses[:3])
    assert [(root / name).is_symlink() for name in ("clip", "prior", "decoder", "upsampler_1")] == [1, 0, 1, 1]
    before, after = loaded(system)["prior"], loaded(root)["prior"]
    assert (before.stage.model, before.stage.whiten, before.stage.diffusion) == (
        after.stage.model,
        after.stage.whiten,
        after.stage.diffusion,
    )
    assert before.tokenizer == after.tokenizer
    jax.tree.map(np.testing.assert_array_equal, before.variables.stats, after.variables.stats)  # whitening statistics
    assert sample_image(root, tmp_path / "tuned") != sample_image(system, tmp_path / "untuned")


def test_a_lora_is_small_and_is_merged_when_it_is_read(system, tuned, tmp_path):
    root = tuned["decoder"]
    base, merged = (loaded(place)["decoder"].variables.params for place in (system, root))
    clip = loaded(root)["clip"]
    experiment = stored_experiment(StageFolder(root, "decoder"))
    stage = experiment.trained(experiment.build(clip.tokenizer.vocab_size, clip.stage))
    target = jax.eval_shape(stage.init, jax.random.key(0)).params
    target = with_shardings(target, tree_shardings(target, make_mesh(MeshConfig())))
    factors = Checkpoints(StageFolder(root, "decoder")).restore({"ema": target}).trees["ema"]
    count, total = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (factors, base))
    assert 0 < count < 0.05 * total
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
    sample_image(root, tmp_path / "out")
    run_ok(weights, "export", "diffusers", root, tmp_path / "folder")  # the export merges the LoRA too
    again = loaded(import_into(tmp_path / "again", tmp_path / "folder"))["decoder"].variables.params
    jax.tree.map(np.testing.assert_array_equal, again, merged)


def at(tree, names):
    """Returns the value at a path of a tree."""
    for name in names:
        tree = tree[name]
    return tree
