"""The training loop: feed, step, log, save, resume. It is the same for every stage.

The host only dispatches: metrics stay on the devices until the next logged step, batches are copied to the devices
while they compute the previous step, and checkpoints are written by a thread.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
from jax.sharding import Mesh

from dalle2_jax import rng
from dalle2_jax.compilation import compile_ahead
from dalle2_jax.errors import UserError
from dalle2_jax.stages.base import Stage, Variables
from dalle2_jax.training.configs import RunConfig
from dalle2_jax.training.divergence import FiniteCheckpoints, not_finite
from dalle2_jax.training.feed import Stream, prefetched
from dalle2_jax.training.hooks import Hooks
from dalle2_jax.training.interrupt import Interrupt, Stopped, agreed, interrupted
from dalle2_jax.training.optim import Optimizer
from dalle2_jax.training.reporting.console import Console, progress
from dalle2_jax.training.reporting.meter import Meter
from dalle2_jax.training.reporting.metrics import MetricWriter
from dalle2_jax.training.reporting.profiling import Profile, Tracer
from dalle2_jax.training.reporting.trackers import Tracker, Tracking
from dalle2_jax.training.sharding import on_devices, shard_batch, with_shardings
from dalle2_jax.training.state import Start, TrainState
from dalle2_jax.training.step import abstract_state, init_state, make_train_step, parameter_count, state_shardings
from dalle2_jax.types import Batch, Metrics, Params
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.folder import StageFolder


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that `train` needs.

    Attributes:
      run: the length of the run.
      stage: what is trained.
      frozen: the variables of the stages that ``stage.requires`` names.
      optimizer: the update rule.
      ema_decay: of the averaged weights.
      stream: of batches.
      mesh: of devices.
      folder: where metrics and checkpoints are written.
      hooks: functions called between steps.
      start: the variables that a fine-tuned run starts from. Its parameters are donated.
      rejected: returns how many records of the data set were rejected, by cause, on all hosts. A collective operation:
        every host calls it when one does.
      remedy: a sentence about what to do if the run diverges.
      examples: number of training examples; None if unknown.
      config: the config page, for the banner.
      tracker: gets the metrics too; None for no tracker.
      show_progress: whether a banner and a progress bar are printed.
      accumulate: number of micro-batches in which the gradients of a batch are computed.
      ema_memory: where the averaged weights are, see `state_shardings`.
      profile: the steps of which a trace is written to the stage's folder, under "profile"; None for none.
    """

    run: RunConfig
    stage: Stage
    frozen: Mapping[str, Variables]
    optimizer: Optimizer
    ema_decay: float
    stream: Stream
    mesh: Mesh
    folder: StageFolder
    hooks: Hooks = Hooks()
    start: Start | Variables = Start()
    rejected: Callable[[], Mapping[str, int]] = dict
    remedy: str = "Lower the learning rate"
    examples: int | None = None
    config: str = ""
    tracker: Tracker | None = None
    show_progress: bool = True
    accumulate: int = 1
    ema_memory: str = "device"
    profile: Profile | None = None


def train(job: Job) -> TrainState:
    """Trains to ``total_steps``, from the newest checkpoint if there is one, and returns the last state.

    Raises:
      UserError: a metric or the state is not finite, and is not saved; or the data cannot be read, or the run was
        interrupted, and a checkpoint was written.
    """
    run, key = job.run, rng.root(job.run.seed)
    checkpoints = Checkpoints(job.folder, run.keep_checkpoints)
    state, skipped = restore_or_init(job, key, checkpoints)
    first = int(state.step)
    with (
        Console(job.stage.name, first, run.total_steps, job.show_progress) as console,
        MetricWriter(job.folder.path, first) as writer,
        Tracking(job.tracker, job.folder, console.warn) as tracking,
        Tracer(job.profile, job.folder.path / "profile") as tracer,
    ):
        for message in skipped:
            console.warn(message)
        describe(job, first, console)
        try:
            with Interrupt() as interrupt:
                finite = FiniteCheckpoints(checkpoints, first, job.remedy)
                return Loop(job, key, finite, Reports(writer, tracking, console, tracer), interrupt).run(state)
        finally:
            checkpoints.wait()
            job.stream.close()


class Reports(NamedTuple):
    """Where the metrics of a run go, and the trace of its steps."""

    writer: MetricWriter
    tracking: Tracking
    console: Console
    tracer: Tracer


class Loop:
    """The steps of one run. The caller closes its parts."""

    def __init__(
        self,
        job: Job,
        key: jax.Array,
        checkpoints: FiniteCheckpoints,
        reports: Reports,
        interrupt: Interrupt,
    ):
        self._job, self._key, self._checkpoints = job, key, checkpoints
        self._reports, self._console, self._interrupt = reports, reports.console, interrupt
        self._meter = Meter(job.run.batch_size, checkpoints.last)
        self._data_state = job.stream.get_state()

    def run(self, state: TrainState) -> TrainState:
        """Runs the steps after ``state.step`` and returns the last state.

        The host waits for the devices only in `Meter.add`, at logged steps and at checkpoints.
        """
        job, run, first = self._job, self._job.run, int(state.step)
        step_fn = make_train_step(
            job.stage,
            job.optimizer,
            job.ema_decay,
            state_shardings(job.stage, job.optimizer, job.mesh, job.ema_memory),
            job.accumulate,
        )
        batches = prefetched(job.stream, job.mesh) if first < run.total_steps else iter(())
        for step in range(first + 1, run.total_steps + 1):
            try:
                fed = self._interrupt.next(batches)
            except (UserError, Stopped) as error:
                self._end_without_batch(error, step - 1, state)
            self._data_state = fed.state
            self._meter.count_wait(fed.waited)
            with self._console.compiling(step == first + 1), self._reports.tracer.step(step):
                if step == first + 1:
                    compile_ahead(step_fn, state, job.frozen, self._key, fed.batch)
                state, metrics = step_fn(state, job.frozen, self._key, fed.batch)
                self._meter.add(step, metrics)
            self._reports.tracer.finish(metrics)
            self._interrupt.patient = True
            self._console.advance(self._meter.finished)

            last = step == run.total_steps
            save = last or step % run.checkpoint_every == 0
            evaluate = _due(job.hooks.evaluate, run.eval_every, step, last)
            log = save or evaluate or step % run.log_every == 0
            # read once: a signal that arrives later is answered after the next step
            stop = agreed(self._interrupt.requested, log)
            if log or stop:
                self._log(step, state, metrics, evaluate)
            if save or stop:
                self._save(step, state)
            if job.hooks.preview and _due(job.hooks.preview, run.sample_every, step, last):
                with self._meter.paused(metrics):
                    job.hooks.preview(on_devices(state.averaged), step)
            if stop and not last:
                raise interrupted(step, stop)
        return state

    def _end_without_batch(self, error: UserError | Stopped, step: int, state: TrainState) -> NoReturn:
        """Saves the finished steps after bad data or a signal, and raises the error, or `Interrupted` for a signal."""
        if step > self._checkpoints.last and jax.process_count() == 1:
            self._checkpoints.means(self._meter.unread())
            self._save(step, state)
        if isinstance(error, Stopped):
            raise interrupted(step, self._interrupt.requested) from None
        raise error

    def _log(self, step: int, state: TrainState, metrics: Metrics, evaluate: bool) -> None:
        """Writes and shows the means of the metrics since the last logged step."""
        hooks = self._job.hooks
        means: dict[str, Any] = self._checkpoints.means(self._meter.unread())
        if evaluate and hooks.evaluate:
            try:
                with self._meter.paused(metrics):
                    means |= hooks.evaluate(on_devices(state.averaged), step)
            except FloatingPointError as error:
                raise self._checkpoints.diverged(str(error)) from error
        means |= self._meter.rates(step)
        self._reports.writer.write(step, means, self._job.rejected())
        self._reports.tracking.log(step, means)
        self._console.show_metrics(step, means)
        if hooks.log:
            hooks.log(step, means)

    def _save(self, step: int, state: TrainState) -> None:
        self._checkpoints.save(step, state, self._data_state)
        if self._job.hooks.checkpoint:
            self._job.hooks.checkpoint(step)


def _due(hook: Callable | None, every: int, step: int, last: bool) -> bool:
    """Whether a hook that is called every ``every`` steps, and after the last one, is called after ``step``."""
    return hook is not None and every > 0 and (last or step % every == 0)


# --- before the first step ------------------------------------------------------------------


def describe(job: Job, step: int, console: Console) -> None:
    """Prints what is trained, on what, and where it is written."""
    devices = jax.device_count()
    facts = [
        f"{devices} {jax.devices()[0].platform} device{'s' if devices > 1 else ''}",
        f"{parameter_count(job.stage):,} parameters",
        *([f"{job.examples:,} training images"] if job.examples is not None else []),
        f"{job.run.total_steps:,} steps of {job.run.batch_size:,}",
        *([f"config {job.config}"] if job.config else []),
        f"in {job.folder.path}",
    ]
    console.note(f"{job.stage.name}: {', '.join(facts)}")
    if step:
        console.note(f"{job.stage.name}: continues from step {step}")


def calibrated(job: Job) -> Params | None:
    """Returns the statistics before the first step: those of ``job.start``, or measured ones, else None.

    The stream's position does not change.
    """
    if job.start.stats is not None or not job.stage.calibrates:
        return job.start.stats
    start = job.stream.get_state()
    with progress(f"{job.stage.name}: calibrating", "batch", job.show_progress) as bar:

        def batches() -> Iterator[Batch]:
            while True:
                yield shard_batch(next(job.stream), job.mesh)
                bar.update()

        stats = job.stage.calibrate(job.frozen, batches())
    job.stream.set_state(start)
    return stats


def restore_or_init(job: Job, key: jax.Array, checkpoints: Checkpoints) -> tuple[TrainState, list[str]]:
    """Returns the newest readable checkpoint's state, or a fresh one, and a line for each checkpoint that is damaged.

    The stream moves to the checkpoint's position.
    """
    shardings = state_shardings(job.stage, job.optimizer, job.mesh, job.ema_memory)
    target = with_shardings(abstract_state(job.stage, job.optimizer), shardings)
    restored = checkpoints.restore(target.trees(), optional=("ema_stats",))
    if restored is None:
        start = calibrated(job), job.start.params
        return init_state(job.stage, job.optimizer, key, job.mesh, *start, job.ema_memory), []
    if restored.skipped:
        checkpoints.discard_after(restored.step)
    job.stream.set_state(restored.data_state)
    state = TrainState.from_trees(restored.step, restored.trees, job.stage.training_rules.averaged_stats)
    state = dataclasses.replace(state, step=jax.device_put(state.step, shardings.step))
    wrong = not_finite(state)
    if wrong:
        path = job.folder.path / "checkpoints" / str(restored.step)
        raise UserError(f"checkpoint {path} has NaN or infinite {wrong}: remove it, and give the same command again")
    return state, [*restored.skipped]
