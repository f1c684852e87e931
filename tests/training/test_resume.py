"""A resumed run of a real stage on real data equals an uninterrupted one, bit for bit."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import test_loop
from line_stage import Line

from dalle2_jax import testing
from dalle2_jax.data import ShapesSource, make_stream, prepare
from dalle2_jax.errors import SystemWarning
from dalle2_jax.stages.base import TrainingRules
from dalle2_jax.training.loop import Job, RunConfig, train
from dalle2_jax.training.optim import OptimConfig, make_optimizer
from dalle2_jax.training.sharding import MeshConfig, make_mesh, tree_shardings
from dalle2_jax.workdir import digests
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.claim import claim
from dalle2_jax.workdir.folder import StageFolder

STEPS = 6
SOURCE = ShapesSource("train", testing.IMAGE_SIZE, num_examples=20)  # fewer than the run sees
OPTIMIZER = make_optimizer(OptimConfig(lr=1e-3, warmup_steps=2, schedule="cosine"), STEPS)


def make_job(root, kind, total_steps):
    stage, mesh = testing.tiny_stage(kind), make_mesh(MeshConfig())
    folder = StageFolder(root, stage.name)
    claim(folder, {"kind": kind}, None)
    frozen = testing.tiny_frozen(stage)
    frozen = jax.device_put(frozen, tree_shardings(frozen, mesh))
    stream = make_stream(prepare(SOURCE, testing.WordTokenizer(), testing.CONTEXT_LENGTH), 8, seed=0)
    run = RunConfig(total_steps=total_steps, batch_size=8, log_every=2, checkpoint_every=2)
    return Job(run, stage, frozen, OPTIMIZER, 0.9, stream, mesh, folder)


def test_resumed_equals_uninterrupted(tmp_path):
    kind = "prior"  # it requires weights; statistics are resumed in test_loop.py
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


@dataclasses.dataclass(frozen=True)
class Averaged(Line):
    """Its only statistic, the number of steps, is averaged."""

    training_rules: TrainingRules = TrainingRules(averaged_stats=("count",))


def test_a_checkpoint_without_averaged_statistics_continues_from_the_last_ones(tmp_path):
    """As those of earlier releases are."""
    job = dataclasses.replace(test_loop.make_job(tmp_path, total_steps=3), stage=Averaged())
    assert train(job).ema_stats["count"] < 3
    checkpoint = job.folder.path / "checkpoints" / "3"
    shutil.rmtree(checkpoint / "ema_stats")
    (checkpoint / digests.NAME).unlink()
    job = dataclasses.replace(test_loop.make_job(tmp_path, total_steps=4), stage=Averaged())
    decay = (1 + 4) / (10 + 4)
    with pytest.warns(SystemWarning, match="no digests"):  # the digests were removed above
        state = train(job)
    np.testing.assert_allclose(state.ema_stats["count"], decay * 3 + (1 - decay) * 4, rtol=1e-6)
