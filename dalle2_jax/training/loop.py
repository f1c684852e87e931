"""The training loop: feed, step, log, save, resume. It never names a stage.

The host only dispatches: metrics stay on the device until the next logged step, batches are
put on the devices while the step before computes, and checkpoints are written by a thread.
"""

import collections
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import optax
from jax.sharding import Mesh

from dalle2_jax import rng
from dalle2_jax.stages.base import Calibrates, Stage, Variables
from dalle2_jax.training import metrics as metrics_lib
from dalle2_jax.training.sharding import shard_batch, with_shardings
from dalle2_jax.training.state import TrainState
from dalle2_jax.training.step import abstract_state, init_state, make_train_step, state_shardings
from dalle2_jax.types import Batch, Metrics, Params, UserError
from dalle2_jax.workdir import Checkpoints, StageFolder

PREFETCH = 2
"""Batches on the device beyond the one in use."""

AHEAD = 2
"""Steps that wait on the devices behind the one they compute: enough that they never idle, and few enough that the host
does not rush through the batches that lie ready, as it would after each log.
"""


class Stream(Protocol):
    """An infinite iterator of this process's rows of global batches, with one small state."""

    def __next__(self) -> dict[str, Any]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long a run goes and how often it reports. ``sample_every`` 0 draws no pictures."""

    seed: int = 0
    total_steps: int = 1000
    batch_size: int = 64
    log_every: int = 50
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    sample_every: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything ``train`` needs, assembled by the entry point.

    ``start`` are the weights and statistics that a run begins with, where they are not fresh: of fine-tuning.
    Parts may be missing; its parameters are given away.

    ``rejected`` tells for the metrics how many records of the data set were refused, by cause: when it was opened, and
    by all hosts since, so that each of them must ask whenever one does.
    """

    run: RunConfig
    stage: Stage
    frozen: Mapping[str, Variables]
    optimizer: optax.GradientTransformation
    ema_decay: float
    stream: Stream
    mesh: Mesh
    folder: StageFolder
    preview: Callable[[Variables, int], None] | None = None
    start: Variables = Variables(None, None)
    rejected: Callable[[], Mapping[str, int]] = dict


def prefetched(stream: Stream, mesh: Mesh) -> Iterator[tuple[Batch, dict[str, Any], float]]:
    """Yields (batch on the devices, the stream's state after it, seconds waited for the host)."""
    queue: collections.deque = collections.deque()
    while True:
        waited = 0.0
        while len(queue) <= PREFETCH:
            start = time.perf_counter()
            rows = next(stream)
            waited += time.perf_counter() - start
            queue.append((shard_batch(rows, mesh), stream.get_state()))
        batch, state = queue.popleft()
        yield batch, state, waited


def idle(history: list[tuple[int, Metrics]]) -> bool:
    """Whether the devices have computed all steps that they were given."""
    return not history or all(value.is_ready() for value in history[-1][1].values())


class Interrupt:
    """Turns SIGINT and SIGTERM into a flag, so that the loop ends with a checkpoint. A context manager."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _: Any) -> None:
        self.requested = True
        signal.signal(number, self._previous[number])  # a second signal ends at once

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def calibrated(job: Job) -> Params | None:
    """Returns the statistics before the first step: the start's or measured ones, else None.

    The stream stays where it is.
    """
    if job.start.stats is not None or not (isinstance(job.stage, Calibrates) and job.stage.calibrates):
        return job.start.stats
    start = job.stream.get_state()
    with metrics_lib.progress(f"{job.stage.name}: calibrating", "batch") as bar:

        def batches() -> Iterator[Batch]:
            while True:
                yield shard_batch(next(job.stream), job.mesh)
                bar.update()

        stats = job.stage.calibrate(job.frozen, batches())
    job.stream.set_state(start)
    return stats


def restore_or_init(job: Job, key: jax.Array, checkpoints: Checkpoints) -> tuple[TrainState, list[str]]:
    """Returns the newest readable checkpoint's state, or a fresh one, and what to tell the user.

    The stream is moved to where the checkpoint left it.
    """
    shardings = state_shardings(job.stage, job.optimizer, job.mesh)
    target = with_shardings(abstract_state(job.stage, job.optimizer), shardings)
    restored = checkpoints.restore(target.trees())
    if restored is None:
        return init_state(job.stage, job.optimizer, key, job.mesh, calibrated(job), job.start.params), []
    if restored.skipped:
        checkpoints.discard_after(restored.step)
    job.stream.set_state(restored.data_state)
    state = TrainState.from_trees(restored.step, restored.trees)
    state = state.replace(step=jax.device_put(state.step, shardings.step))
    return state, [*restored.skipped, f"{job.stage.name}: continues from step {restored.step}"]


def train(job: Job) -> TrainState:
    """Trains to ``total_steps``, from the newest checkpoint if there is one, and returns the last state.

    Raises:
      UserError: a loss is not finite; or the data are bad, or the run was interrupted, and a checkpoint was written.
    """
    run, key = job.run, rng.root(job.run.seed)
    checkpoints = Checkpoints(job.folder, run.keep_checkpoints)
    state, messages = restore_or_init(job, key, checkpoints)
    first = int(state.step)
    with metrics_lib.MetricWriter(job.folder.path, job.stage.name, first, run.total_steps) as writer:
        for message in messages:
            writer.say(message)
        try:
            with Interrupt() as interrupt:
                return _run(job, key, state, first, checkpoints, writer, interrupt)
        finally:
            checkpoints.wait()
            job.stream.close()


def _run(job, key, state, first, checkpoints, writer, interrupt) -> TrainState:
    """Runs the steps after ``first``; the caller owns the writer and waits for the checkpoints."""
    run = job.run
    step_fn = make_train_step(
        job.stage, job.optimizer, job.ema_decay, state_shardings(job.stage, job.optimizer, job.mesh)
    )
    history, waited, saved, clock, data_state = [], 0.0, first, None, job.stream.get_state()
    batches = prefetched(job.stream, job.mesh) if first < run.total_steps else iter(())
    for step in range(first + 1, run.total_steps + 1):
        try:
            batch, next_state, wait = next(batches)
        except UserError:  # what is wrong with the data takes nothing of what was learnt of them
            if step - 1 > saved and jax.process_count() == 1:
                metrics_lib.mean_of_finite(jax.device_get(history), saved)
                checkpoints.save(step - 1, state.trees(), data_state)
            raise
        data_state = next_state
        waited += wait if idle(history) else 0.0  # else the devices had steps to compute meanwhile
        state, metrics = step_fn(state, job.frozen, key, batch)
        history.append((step, metrics))
        if len(history) > AHEAD:
            jax.block_until_ready(history[-1 - AHEAD])
        if clock is None:  # the first step compiles; time is counted from its end
            jax.block_until_ready(metrics)
            clock, waited, timed_from = time.perf_counter(), 0.0, step
        stop = interrupt.requested  # read once: a signal after this is the next step's to answer
        save = stop or step == run.total_steps or step % run.checkpoint_every == 0
        if step % run.log_every == 0 or save:
            means = metrics_lib.mean_of_finite(jax.device_get(history), saved)
            seconds = max(time.perf_counter() - clock, 1e-9)
            rate = (step - timed_from) * run.batch_size / seconds
            writer.write(
                step, {**means, "examples_per_second": rate, "data_wait": waited / seconds}, job.rejected()
            )
            history, waited, clock, timed_from = [], 0.0, time.perf_counter(), step
        if save:
            checkpoints.save(step, state.trees(), data_state)
            saved = step
        if job.preview and run.sample_every and (step % run.sample_every == 0 or step == run.total_steps):
            jax.block_until_ready(metrics)  # the clock stops for the pictures, not for steps under way
            start = time.perf_counter()
            job.preview(Variables(state.ema, state.stats), step)
            clock += time.perf_counter() - start
        if stop and step < run.total_steps:
            raise UserError(f"interrupted at step {step}, which is saved; the same command continues from there")
    return state
