"""A stage of one matrix, a stream of numbers, and jobs that train the one on the other."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.stages.base import Outputs, StageDefaults, Variables
from dalle2_jax.training.hooks import Hooks
from dalle2_jax.training.loop import Job, RunConfig
from dalle2_jax.training.optim import OptimConfig, make_optimizer
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.claim import claim
from dalle2_jax.workdir.folder import StageFolder

STEPS, ROWS = 6, 8
OPTIMIZER = make_optimizer(OptimConfig(lr=0.01, warmup_steps=2, schedule="cosine", weight_decay=0.1), STEPS)


@dataclasses.dataclass(frozen=True)
class Line(StageDefaults):
    """Learns a matrix of the batch's numbers, with noise from its key, and counts its steps."""

    name: str = "line"

    def init(self, key):
        return Variables({"kernel": jax.random.normal(key, (8, 8))}, {"count": jnp.zeros(())})

    def loss(self, params, stats, frozen, key, batch):
        noise = 0.1 * jax.random.normal(key, (8, 8))
        error = params["kernel"] - batch["x"].mean(axis=0)[None] + noise
        return jnp.square(error).mean(), Outputs({"noise": noise.sum()}, {"count": stats["count"] + 1})


class Numbers:
    """A stream of batches that are filled with their index. ``events`` (index -> function or value) replace it."""

    def __init__(self, events=None):
        self.next, self.events = 0, events or {}

    def __next__(self):
        event, self.next = self.events.get(self.next, float(self.next)), self.next + 1
        return {"x": np.full((ROWS, 8), event() if callable(event) else event, np.float32)}

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]

    def close(self):
        self.closed = True


def make_job(root, stream=None, mesh=None, preview=None, **run):
    folder = StageFolder(root, "line")
    claim(folder, {"name": "line"}, None)
    run = RunConfig(**{"total_steps": STEPS, "batch_size": ROWS, "log_every": 1, "checkpoint_every": 3} | run)
    stream, mesh = stream or Numbers(), mesh or make_mesh(MeshConfig())
    return Job(run, Line(), {}, OPTIMIZER, 0.9, stream, mesh, folder, Hooks(preview=preview))


def lines(job):
    return [json.loads(line) for line in (job.folder.path / "metrics.jsonl").read_text().splitlines()]


def saved(job, state):
    """The newest checkpoint, its trees those of ``state``."""
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    return Checkpoints(job.folder).restore(abstract.trees())


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)
