"""Loads stages and systems from disk."""

import dataclasses
import pathlib
import re
import shlex
import warnings
from collections.abc import Sequence
from typing import Any, TypeGuard, cast

import jax

from dalle2_jax import compilation, pretrained, text
from dalle2_jax.config import inherit
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.parse import expand_file
from dalle2_jax.config.specs import STAGES
from dalle2_jax.config.stored import errors_named, stored_experiment, write_experiment
from dalle2_jax.diffusion import NoiseStatistics
from dalle2_jax.errors import SystemWarning, UserError, choose
from dalle2_jax.stages import ClipStage, EmbeddingContract, Stage, Variables, abstract_variables, fingerprint
from dalle2_jax.system import PRIORS, LoadedStage, check_agreement
from dalle2_jax.training.sharding import tree_shardings, with_shardings
from dalle2_jax.workdir import packed
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.folder import StageFolder


def load_stage(
    root: pathlib.Path,
    name: str,
    mesh: jax.sharding.Mesh,
    clip: ClipStage | None = None,
    allow_unfinished: bool = False,
) -> LoadedStage:
    """Loads one stage of a system, its averaged weights sharded over ``mesh``.

    Args:
      root: the workdir.
      name: of the stage.
      mesh: the devices.
      clip: the system's CLIP, for a stage that requires one.
      allow_unfinished: whether a stage whose training has not ended is loaded, with a SystemWarning. A CLIP never is:
        its embedding contract is that of its final weights.

    Raises:
      UserError: the stage is missing or unfinished; the message names the command that trains it.
    """
    folder = StageFolder(root, name)
    folder.reject_links()
    experiment, step = stored_experiment(folder), folder.latest_step()
    if experiment is None or step is None:
        raise UserError(missing_stage(root, name))
    contract, total = inherit.stored_contract(folder), experiment.run.total_steps
    if step < total or (name == "clip" and contract is None):
        unfinished = f"stage {name} in {root} is unfinished ({step} of {total} steps)"
        if not allow_unfinished or name == "clip":
            raise UserError(f"{unfinished}: {_how_to_train(root, name)}")
        warnings.warn(unfinished, SystemWarning, stacklevel=2)
    tokenizer = _load_tokenizer(folder) if experiment.spec.reads_text else None
    stage = _build(folder, experiment, tokenizer, clip)
    variables, step = _restore(folder, experiment, stage, mesh, clip)
    folder.warn_if_changed()
    return _described(_with_noise_statistics(folder, stage, step), experiment, tokenizer, contract, variables, step)


def _build(
    folder: StageFolder, experiment: Experiment, tokenizer: text.Tokenizer | None, clip: ClipStage | None
) -> Stage:
    """Returns the stage that a folder's experiment describes. UserError, which names the file, if it cannot be."""
    with errors_named(folder):
        sizes = tokenizer or (experiment.spec.text if experiment.spec.reads_text else None)
        stage = experiment.build(None if sizes is None else sizes.vocab_size, clip)
    return stage


def _restore(
    folder: StageFolder, experiment: Experiment, stage: Stage, mesh: jax.sharding.Mesh, clip: ClipStage | None
) -> tuple[Variables, int]:
    """Returns the averaged weights and statistics of the newest readable checkpoint, and its step."""
    trained = experiment.trained(stage)
    abstract = _shapes(trained)
    shapes = with_shardings(abstract, tree_shardings(abstract, mesh))
    averaged = {name: shapes.stats[name] for name in trained.training_rules.averaged_stats}
    trees = {"ema": shapes.params, "stats": shapes.stats, "ema_stats": averaged}
    restored = Checkpoints(folder).restore(trees, optional=("ema_stats",))
    if restored is None:
        raise UserError(missing_stage(folder.root, folder.stage))
    for message in restored.skipped:
        warnings.warn(f"{message}; step {restored.step} is used", SystemWarning, stacklevel=2)
    stats = {**restored.trees["stats"], **restored.trees.get("ema_stats", {})}
    variables = Variables(restored.trees["ema"], stats)
    base = {} if experiment.lora is None else {stage.name: load_base(folder, experiment, mesh, clip)}
    return trained.merged(base, variables), restored.step


def _shapes(stage: Stage) -> Variables:
    """Returns the shapes of a stage's variables, from disk where they are in the cache of compiled programs."""
    return Variables(**compilation.load_or_build_shapes(repr(stage), lambda: abstract_variables(stage)._asdict()))


def _with_noise_statistics(folder: StageFolder, stage: Stage, step: int) -> Stage:
    """Returns the stage with the statistics of its predicted noise, if they were measured on this checkpoint."""
    name = "noise_statistics.json"
    if not (folder.path / name).exists():
        name = "moments.json"  # before version 0.2
    measured = folder.read_json(name)
    if measured is None or measured.get("step") != step:
        return stage
    fields = {key: value for key, value in measured.items() if key != "step"}
    return dataclasses.replace(
        cast(Any, stage), noise_statistics=expand_file(NoiseStatistics, fields, folder.path / name)
    )


def _described(
    stage: Stage,
    experiment: Experiment,
    tokenizer: text.Tokenizer | None,
    contract: EmbeddingContract | None,
    variables: Variables,
    step: int,
) -> LoadedStage:
    reads = experiment.spec.text
    length = reads.context_length if reads and experiment.spec.reads_text else 0
    return LoadedStage(stage, variables, step, contract, tokenizer, length)


def describe_clip(folder: StageFolder) -> LoadedStage:
    """Returns a CLIP without its weights: enough to train a stage on its stored embeddings.

    Raises:
      UserError: its experiment or contract is missing.
    """
    folder.reject_links()
    experiment, contract = stored_experiment(folder), inherit.stored_contract(folder)
    if experiment is None or contract is None:
        missing = "contract.json" if experiment else "experiment.json"
        raise UserError(f"{folder.path} has no {missing}, so it describes no trained clip: copy it from its system")
    tokenizer = _load_tokenizer(folder)
    folder.warn_if_changed()
    stage = _build(folder, experiment, tokenizer, None)
    return _described(stage, experiment, tokenizer, contract, Variables({}, {}), 0)


def write_description(system: pathlib.Path, out: pathlib.Path) -> None:
    """Writes to ``out/clip`` what `describe_clip` reads of a system's clip, or checks that it is there already.

    Raises:
      ContractError: another clip is described there.
    """
    theirs, ours = StageFolder(out, "clip"), StageFolder(system, "clip")
    stored, contract, experiment = (
        inherit.stored_contract(theirs),
        inherit.stored_contract(ours),
        stored_experiment(ours),
    )
    if experiment is None or contract is None:
        raise UserError(missing_stage(system, "clip"))
    if stored is not None:
        stored.check(contract, f"{out} holds embeddings of another clip than that of {system}", "use another --out")
        return
    tokenizer = _load_tokenizer(ours)
    if tokenizer is not None:
        tokenizer.save(theirs.path / "tokenizer")
        theirs.record("tokenizer")
    write_experiment(theirs, experiment)
    theirs.write_json("contract.json", dataclasses.asdict(contract))


def load_base(
    folder: StageFolder, experiment: Experiment, mesh: jax.sharding.Mesh, clip: ClipStage | None
) -> Variables:
    """Loads the variables of the stage that a stored LoRA was trained on, or a stored stage is distilled from.

    Raises:
      UserError: they are not there, or are not those that it was trained on.
    """
    base = inherit.base_of(folder, experiment.init_from)
    variables = load_stage(base.root, base.stage, mesh, clip).variables
    inherit.check_fingerprint(folder, base, fingerprint(variables.params))
    return variables


def tokenizer_path(folder: StageFolder) -> pathlib.Path:
    """Returns the folder of a stage's tokenizer: its own, or CLIP's for a packed stage that shares it."""
    path, step = folder.path / "tokenizer", folder.latest_step()
    shares = not path.exists() and step is not None and packed.is_packed(folder.path / "checkpoints" / str(step))
    return StageFolder(folder.root, "clip").path / "tokenizer" if shares else path


def _load_tokenizer(folder: StageFolder) -> text.Tokenizer | None:
    """Returns a stage's tokenizer; None for an imported stage without one."""
    path = tokenizer_path(folder)
    return None if folder.read_json("source.json") and not path.exists() else text.load_tokenizer(path)


def needed(root: pathlib.Path, name: str) -> tuple[str, ...]:
    """Returns the names of the stages that must be loaded for a stored stage: those that it requires, and itself."""
    stored = stored_experiment(StageFolder(root, name))
    return (name,) if stored is None else (*stored.requires, name)


def load_system(
    root: pathlib.Path, mesh: jax.sharding.Mesh, names: tuple[str, ...] = (), allow_unfinished: bool = False
) -> dict[str, LoadedStage]:
    """Loads stages of a system and checks that they share one embedding contract.

    Args:
      root: the workdir.
      mesh: the devices.
      names: the stages to load; all that were started there if empty.
      allow_unfinished: as in `load_stage`.

    Raises:
      UserError: there is no such system, a stage is missing or unfinished, or two disagree.
    """
    if not root.is_dir():
        included = ", ".join(pretrained.names())
        raise UserError(
            f"there is no system at {root}: train one with train.py --workdir {root}, or use one of those that come "
            f"with the package: {included}"
        )
    names = names or tuple(name for name in STAGES if StageFolder(root, name).exists())
    if not names:
        raise UserError(f"{root} holds no stage: train one with train.py --workdir {root}")
    members: dict[str, LoadedStage] = {}
    for name in sorted(names, key=STAGES.index):
        clip = cast(ClipStage, members["clip"].stage) if "clip" in members else None
        if clip is None and "clip" in needed(root, name)[:-1]:
            raise UserError(f"stage {name} needs stage clip: {_how_to_train(root, 'clip')}")
        members[name] = load_stage(root, name, mesh, clip, allow_unfinished)
    check_agreement(members, str(root))
    return members


def started_stages(root: pathlib.Path) -> tuple[str, ...]:
    """Returns the names of the stages that a training run or an import has started."""
    return tuple(name for name in STAGES if StageFolder(root, name).exists())


def choose_prior(root: pathlib.Path, prior: str | None = None) -> str:
    """Returns the name of the stage that maps captions to image embeddings.

    Args:
      root: the workdir.
      prior: a key of ``PRIORS``; None takes the first that was started there.
    """
    choose("prior", prior or "diffusion", PRIORS)
    started = started_stages(root)
    return PRIORS.get(prior or "") or next((name for name in PRIORS.values() if name in started), "prior")


def cascade_stages(root: pathlib.Path, prior: str | None = None, embeds: bool = True) -> tuple[str, ...]:
    """Returns the names of the stages of a system that generate images, with at most one prior.

    An upsampler without a checkpoint is omitted, with a SystemWarning.

    Args:
      root: the workdir.
      prior: a key of ``PRIORS``; None takes the first that was started there.
      embeds: whether a prior is required, to make image embeddings of captions.
    """
    started = started_stages(root)
    if not started:
        return ()
    decoder = stored_experiment(StageFolder(root, "decoder"))
    condition = {"clip", choose_prior(root, prior)} if embeds else {"clip"}
    needed = {"decoder"} | (condition if decoder is None or "clip" in decoder.requires else set())
    others = trained_stages(root, [name for name in started if name not in {*needed, *PRIORS.values()}])
    return tuple(name for name in STAGES if name in needed or name in others)


def trained_stages(root: pathlib.Path, names: Sequence[str]) -> tuple[str, ...]:
    """Returns those of the names whose stage has a checkpoint; a SystemWarning names the others."""
    trained = tuple(name for name in names if StageFolder(root, name).latest_step() is not None)
    for name in names:
        if name not in trained:
            warnings.warn(f"stage {name} in {root} has no checkpoint yet: it is not used", SystemWarning, stacklevel=2)
    return trained


def missing_stage(root: pathlib.Path, name: str, config_path: str = "") -> str:
    """Returns the message that a system lacks a stage, with the command that trains it.

    Args:
      root: the workdir.
      name: of the stage.
      config_path: the config page of the current run; "" if unknown.
    """
    return f"system {root} has no trained stage {name}: {_how_to_train(root, name, config_path)}"


def _how_to_train(root: pathlib.Path, name: str, config_path: str = "") -> str:
    """Returns the command that trains a stage, guessed from the config pages of the system's other stages.

    A page that a run.json names is used only if it is a plain path to a file below the current folder: in an untrusted
    system it may be any text.
    """
    runs = [StageFolder(root, other).read_json("run.json") for other in STAGES]
    stored = [run.get("config") for run in runs if isinstance(run, dict)]
    known = [path for path in stored if _is_config(path)] + [config_path or "configs/shapes.py"]
    family, _, which = known[0].partition(":")
    form = "," + which.partition(",")[2] if "," in which else ""
    return f"train it with `python train.py --config {family}:{name}{form} --workdir {shlex.quote(str(root))}`"


def _is_config(path: Any) -> TypeGuard[str]:
    """Whether a value is FILE:STAGE in plain letters, of a file below the current folder."""
    found = re.fullmatch(r"([\w.][\w./-]*\.py)(:[\w,=.-]*)?", path, re.ASCII) if isinstance(path, str) else None
    return bool(found) and ".." not in found[1].split("/") and pathlib.Path(found[1]).is_file()
