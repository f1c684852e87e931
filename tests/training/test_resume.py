"""A resumed run of a real stage on real data equals an uninterrupted one, bit for bit."""

import jax
import numpy as np
import pytest

from dalle2_jax import testing
from dalle2_jax.data import ShapesSource, make_stream
from dalle2_jax.training.loop import Job, RunConfig, train
from dalle2_jax.training.optim import OptimConfig, make_optimizer
from dalle2_jax.training.sharding import MeshConfig, make_mesh, tree_shardings
from dalle2_jax.workdir import Checkpoints, StageFolder

STEPS = 6
SOURCE = ShapesSource("train", testing.IMAGE_SIZE, num_examples=20)  # fewer than the run sees
OPTIMIZER = make_optimizer(OptimConfig(lr=1e-3, warmup_steps=2, schedule="cosine"), STEPS)


pytestmark = pytest.mark.usefixtures("quick_programs")


def make_job(root, kind, total_steps):
    stage, mesh = testing.tiny_stage(kind), make_mesh(MeshConfig())
    folder = StageFolder(root, stage.name)
    folder.claim({"kind": kind})
    frozen = testing.tiny_frozen(stage)
    frozen = jax.device_put(frozen, tree_shardings(frozen, mesh))
    stream = make_stream(SOURCE, testing.WordTokenizer(), testing.CONTEXT_LENGTH, 8, seed=0)
    run = RunConfig(total_steps=total_steps, batch_size=8, log_every=2, checkpoint_every=2)
    return Job(run, stage, frozen, OPTIMIZER, 0.9, stream, mesh, folder)


def test_resumed_equals_uninterrupted(tmp_path):
    kind = "prior"  # it borrows weights; statistics are resumed in test_loop.py
    whole = train(make_job(tmp_path / "whole", kind, STEPS))
    half = train(make_job(tmp_path / "halves", kind, STEPS // 2))
    resumed = train(make_job(tmp_path / "halves", kind, STEPS))
    assert int(whole.step) == int(resumed.step) == STEPS
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (half, whole)), strict=True))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), whole)
    for name in ("whole", "halves"):
        saved = Checkpoints(make_job(tmp_path / name, kind, STEPS).folder).restore(shapes.trees())
        assert (saved.step, saved.data_state) == (STEPS, {"global_next_index": 8 * STEPS})
        jax.tree.map(np.testing.assert_array_equal, saved.trees, whole.trees())
