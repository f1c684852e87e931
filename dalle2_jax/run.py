"""A training run, from an experiment to the trained stage: everything it needs is found or made, then the loop runs."""

import contextlib
import dataclasses
import os
import pathlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import jax
from jax.experimental import multihost_utils

from dalle2_jax import compilation, lock, text
from dalle2_jax.config import inherit, sources
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.sources import PythonDataConfig
from dalle2_jax.config.stored import stored_experiment
from dalle2_jax.data import PreparedSource, Source, as_source, fixed_batch, make_stream, prepare
from dalle2_jax.errors import ConfigError, DataError, SystemWarning
from dalle2_jax.stages import ClipStage, Stage, Variables
from dalle2_jax.stages.base import select_columns
from dalle2_jax.system import LoadedStage, load, make_preview
from dalle2_jax.system.requirements import find_clip, find_tokenizer, start_from_base
from dalle2_jax.system.system import System
from dalle2_jax.system.system import load as load_stages
from dalle2_jax.training import hosts, loop
from dalle2_jax.training.accumulation import check_accumulation
from dalle2_jax.training.hooks import Hooks
from dalle2_jax.training.loop import Job
from dalle2_jax.training.optim import OptimConfig, changed_state_field, make_optimizer
from dalle2_jax.training.reporting import held_out, provenance
from dalle2_jax.training.reporting.metrics import from_all_hosts
from dalle2_jax.training.reporting.profiling import Profile
from dalle2_jax.training.reporting.trackers import make_tracker
from dalle2_jax.training.sharding import MeshConfig, batch_shards, check_host_memory, make_mesh, on_devices
from dalle2_jax.training.sharpness import check_replicas
from dalle2_jax.training.state import TrainState
from dalle2_jax.types import Batch, Degrading, Params
from dalle2_jax.workdir.claim import RESUME_CHANGES, claim
from dalle2_jax.workdir.folder import StageFolder
from dalle2_jax.workdir.links import link_stages

PREVIEWED = 12
"""Images of split "val" that are sampled at each ``sample_every``."""


def train_stage(
    experiment: Experiment,
    workdir: str | pathlib.Path,
    *,
    data: Source | None = None,
    page: str = "",
    resume_changes: bool = False,
    show_progress: bool = True,
    callback: Callable[[int, Mapping[str, float]], None] | None = None,
    profile: Profile | None = None,
) -> TrainState:
    """Trains one stage of a system, or continues its run where the newest checkpoint is.

    Args:
      experiment: of the stage.
      workdir: folder of the system; the stage gets a folder of its name in it.
      data: training examples in place of those that ``experiment.data`` names.
      page: the config page of the experiment, for messages.
      resume_changes: whether the optimizer's fields may differ from those of the folder's checkpoints.
      show_progress: whether a banner and a progress bar are printed.
      callback: called at every logged step with the step and its metrics.
      profile: the steps of which a trace is written to the stage's folder.

    Returns:
      The state after the last step.

    Raises:
      ConfigError: the experiment cannot be trained.
      ContractError: the stage, its data and the system's CLIP do not share one embedding space.
      UserError: something that it needs is missing, or the run was interrupted or diverged.
    """
    root = pathlib.Path(workdir)
    with locked_stage(experiment, root):
        job = build_job(experiment, root, page, data=data, resume_changes=resume_changes)
        hooks = dataclasses.replace(job.hooks, log=callback)
        job = dataclasses.replace(job, show_progress=show_progress, hooks=hooks, profile=profile)
        state = loop.train(job)
        record_contract(job, on_devices(state.ema))
    return state


def train(
    experiment: Experiment,
    workdir: str | os.PathLike[str],
    data: Any = None,
    *,
    progress: bool = True,
    callback: Callable[[int, Mapping[str, float]], None] | None = None,
    resume_changes: bool = False,
    profile: tuple[int, int] | None = None,
) -> System:
    """Trains one stage of a system, or continues its training where the newest checkpoint is.

    Args:
      experiment: of the stage, see ``dalle2_jax.experiment``.
      workdir: folder of the system; "~" is the home folder. The stage gets a folder of its name in it.
      data: training examples in place of those that the experiment names: ``{"image": ..., "caption": ...}`` of arrays
        or sequences, an object with ``__len__`` and ``__getitem__`` such as a Hugging Face ``Dataset``, or a source
        of ``dalle2_jax.data``; see `data.as_source`. Images are resized to the resolution of the experiment's data.
      progress: whether a banner and a progress bar are printed.
      callback: called at every logged step with the step and its metrics.
      resume_changes: whether the optimizer's fields may differ from those of the folder's checkpoints.
      profile: the first and the last step of this call, counted from 1, of which a trace is written to the folder
        ``profile`` of the stage.

    Returns:
      The trained stage, loaded with the stages that it requires.

    Raises:
      ConfigError: the experiment cannot be trained.
      ContractError: the stage, its data and the system's CLIP do not share one embedding space.
      DataError: the data cannot be read.
      UserError: something that it needs is missing, or the run was interrupted or diverged.
    """
    root = pathlib.Path(workdir).expanduser()
    compilation.enable_compilation_cache()
    source = None if data is None else as_source(data, experiment.resolution)
    steps = profile and Profile(*profile)
    options: dict[str, Any] = {"resume_changes": resume_changes, "show_progress": progress, "callback": callback}
    train_stage(experiment, root, data=source, profile=steps, **options)
    return load_stages(root, stages=load.needed(root, experiment.stage))


@contextlib.contextmanager
def locked_stage(experiment: Experiment, root: pathlib.Path) -> Iterator[None]:
    """Holds the lock of the stage folder that a run writes; with several hosts, on the first host.

    Raises:
      UserError: another run is training this stage.
    """
    path = root / experiment.stage
    if path.is_symlink() and experiment.init_from is None:  # with init_from, a folder replaces the link
        path = path.resolve()
    if jax.process_index():
        yield
        return
    with lock.hold(path.parent / f".{path.name}{lock.NAME}", path):
        for folder in (path, path / "samples", path / "tokenizer"):
            lock.sweep(folder)
        yield


def build_job(
    experiment: Experiment,
    root: pathlib.Path,
    page: str = "",
    *,
    data: Source | None = None,
    resume_changes: bool = False,
) -> Job:
    """Finds or makes everything that a run needs, and claims its folder; errors are raised before anything is written.

    With ``init_from``, the run starts from that system's stage; stages that the workdir lacks are linked from there.

    Args:
      experiment, root, page, data, resume_changes: see `train_stage`, where ``root`` is ``workdir``.
    """
    experiment, base = inherit.with_base(_with_data(experiment, data), root)
    optim, mesh_config = experiment.check_trainable()
    folder = StageFolder(root, experiment.stage)
    mesh, run = _make_mesh(experiment, mesh_config), experiment.run
    folder.reject_links()
    source = sources.open_source(experiment.data, "train", experiment.preprocessing) if data is None else data
    clip = find_clip(experiment, folder, base, source, mesh, page)
    tokenizer = find_tokenizer(experiment, folder, base, source, clip)
    clip_stage = None if clip is None else cast(ClipStage, clip.stage)
    stage = experiment.build(tokenizer.vocab_size if tokenizer else None, clip_stage)
    _check_division(stage, optim, run.batch_size, mesh)
    prepared, inputs = _prepare(experiment, stage, source, tokenizer, stage.degrading)
    process = jax.process_index(), jax.process_count()
    frozen = {"clip": clip.variables} if clip and clip.variables.params else {}
    job = Job(
        run,
        stage,
        frozen,
        make_optimizer(optim, run.total_steps, stage.training_rules.decay),
        optim.ema_decay,
        make_stream(prepared.select(inputs), run.batch_size, run.seed, *process, num_workers=run.workers),
        mesh,
        folder,
        Hooks(preview=_make_preview(experiment, stage, frozen, tokenizer, folder)),
        rejected=_count_rejected(source),
        remedy=f"Run the same command with --config.optim.lr={optim.lr / 2:g} {RESUME_CHANGES}",
        examples=len(source),
        config=page,
        tracker=make_tracker(run.tracker),
        accumulate=optim.accumulate,
        ema_memory=optim.ema_memory,
    )
    job, identity = start_from_base(job, base, experiment, clip_stage) if base else (job, None)
    job = _with_evaluation(experiment, job, stage, tokenizer)
    if jax.process_index() == 0:
        if base and folder.is_link_to(base):
            folder.path.unlink()
        _claim(folder, experiment, optim if resume_changes else None, tokenizer, clip)
        folder.write_json("run.json", {**(folder.read_json("run.json") or {}), **provenance.describe(job)})
        if base and identity is not None:
            folder.write_json("base.json", {"weights": identity})
            link_stages(base.root, root, inherit.incompatible_stages(base, folder))
    hosts.wait_for_all(f"{folder.path} is claimed")
    multihost_utils.sync_global_devices(f"{folder.path} is claimed")
    return job


def _check_division(stage: Stage, optim: OptimConfig, batch_size: int, mesh: jax.sharding.Mesh) -> None:
    """Checks that the batch can be divided into micro-batches or replicas as the section ``optim`` asks."""
    check_accumulation(stage, optim.accumulate, batch_size, mesh)
    check_replicas(stage, optim, batch_size, mesh)


# --- data -----------------------------------------------------------------------------------


def _with_data(experiment: Experiment, source: Source | None) -> Experiment:
    """Returns the experiment with a note of the data that were given in Python, if any were."""
    if source is None:
        return experiment
    has_images = "image" in source.columns
    side = int(source.select(["image"]).fetch([0])["image"].shape[1]) if has_images else None
    config = PythonDataConfig(type(source).__name__, len(source), side)
    return experiment.with_data(config)


def _prepare(
    experiment: Experiment,
    stage: Stage,
    source: Source,
    tokenizer: text.Tokenizer | None,
    degrading: Degrading | None,
) -> tuple[PreparedSource, tuple[str, ...]]:
    """Returns the data set with the tokens and degraded images of a stage, and the columns that the stage reads.

    Columns that are not stored are replaced by those that the frozen CLIP computes them from; of stored embeddings, all
    that the stage reads must be there, since they are trained on without CLIP's weights.
    """
    reads = experiment.spec.text
    length = reads.context_length if tokenizer and reads else 0
    prepared = prepare(source, tokenizer, length, degrading)
    inputs = stage.inputs if degrading else tuple(name for name in stage.inputs if name != "low_res")
    stored = prepared.stored_embeddings is not None
    return prepared, inputs if stored else select_columns(inputs, prepared.columns)


def _make_preview(
    experiment: Experiment,
    stage: Stage,
    frozen: Mapping[str, Variables],
    tokenizer: text.Tokenizer | None,
    folder: StageFolder,
) -> Callable[[Variables, int], None] | None:
    """Returns the hook that samples images of split "val" in training; None if the run or the stage has none."""
    given = isinstance(experiment.data, PythonDataConfig)  # has no split "val"
    if not experiment.run.sample_every or stage.image_size is None or given:
        return None
    held_out = sources.open_source(experiment.data, "val", experiment.preprocessing)
    prepared, inputs = _prepare(experiment, stage, held_out, tokenizer, None)
    batch, captions = fixed_batch(prepared, range(min(PREVIEWED, len(held_out))), inputs)
    return make_preview(stage, frozen, batch, captions, folder.path / "samples")


def _with_evaluation(experiment: Experiment, job: Job, stage: Stage, tokenizer: text.Tokenizer | None) -> Job:
    """Returns the job with the hook that measures examples of split "val", unless the run or its data have none.

    Args:
      experiment: of the run.
      job: of the run.
      stage: that reads the data: the job's, or of a LoRA the one that it changes.
      tokenizer: of the captions.
    """
    if not experiment.run.eval_every or isinstance(experiment.data, PythonDataConfig):
        return job
    try:
        source = sources.open_source(experiment.data, "val", experiment.preprocessing)
    except DataError as error:
        warnings.warn(f"config.eval_every has no effect: {error}", SystemWarning, stacklevel=2)
        return job
    prepared, inputs = _prepare(experiment, stage, source, tokenizer, stage.degrading)
    selected = prepared.select(inputs)
    rows = held_out.batch_rows(len(source), job.run.batch_size, job.mesh)

    def batches() -> Iterable[Batch]:
        for indices in rows:
            yield Batch(**selected.fetch(indices[jax.process_index() :: jax.process_count()]))

    evaluate = held_out.make_evaluation(job.stage, job.frozen, batches, job.mesh) if rows else None
    return dataclasses.replace(job, hooks=dataclasses.replace(job.hooks, evaluate=evaluate))


def _count_rejected(source: Source) -> Callable[[], Mapping[str, int]]:
    """Returns a function that counts rejected records by cause: at the opening (every host), and since on any host."""
    known: dict[str, str] = {}

    def count() -> Counter[str]:
        found = source.rejections
        since = {**found.records, **found.flawed}
        known.update(from_all_hosts({name: cause for name, cause in since.items() if name not in known}))
        return Counter(found.at_opening) + Counter(known.values())

    return count


def _make_mesh(experiment: Experiment, config: MeshConfig) -> jax.sharding.Mesh:
    mesh, batch_size = make_mesh(config), experiment.run.batch_size
    check_host_memory(mesh, experiment.host_memory_fields)
    if batch_size % batch_shards(mesh):
        raise ConfigError(f"batch_size {batch_size} does not divide over the mesh {dict(mesh.shape)}", "batch_size")
    return mesh


# --- the contract --------------------------------------------------------------------------


def record_contract(job: Job, params: Params) -> None:
    """Writes the contract of a CLIP that has finished training; other stages have theirs from the start."""
    contract = job.stage.contract(job.stage.merged(job.frozen, Variables(params, {})).params)
    if contract is None or jax.process_index():
        return
    stored = inherit.stored_contract(job.folder)
    if stored is not None and stored.clip == contract.clip:  # other stages may have been trained under it already
        contract = dataclasses.replace(contract, preprocessing=stored.preprocessing)
    job.folder.write_json("contract.json", dataclasses.asdict(contract))


# --- the folder -----------------------------------------------------------------------------


def _claim(
    folder: StageFolder,
    experiment: Experiment,
    changed_optim: OptimConfig | None,
    tokenizer: text.Tokenizer | None,
    clip: LoadedStage | None,
) -> None:
    """Writes the files that a stage's folder has before the first step.

    ``changed_optim`` is the optimizer of a run that may change the fields of the folder's checkpoints.
    """
    stored = stored_experiment(folder)
    if changed_optim is not None and stored is not None and folder.latest_step() is not None:
        _check_optimizer_state(folder, stored.optim or OptimConfig(), changed_optim)
    claim(folder, experiment.to_json(), stored and stored.to_json(), changed_optim is not None)
    if tokenizer:
        tokenizer.save(folder.path / "tokenizer")
        folder.record("tokenizer")
    if clip and clip.contract:
        folder.write_json("contract.json", dataclasses.asdict(clip.contract))


def _check_optimizer_state(folder: StageFolder, stored: OptimConfig, optim: OptimConfig) -> None:
    """Raises ConfigError if the optimizer cannot continue from the state in a folder's checkpoints."""
    field = changed_state_field(stored, optim)
    if field is not None:
        values = (getattr(config, field) for config in (stored, optim))
        before, after = (f"{value:g}" if isinstance(value, float) else value for value in values)
        raise ConfigError(
            f"config.optim.{field} cannot change from {before} to {after} in "
            f"{folder.path}: the optimizer's state there has another form. Give the stored value, or start another "
            f"--workdir from these weights with --config.init_from={folder.root}",
            f"optim.{field}",
        )
