"""What a training run requires of its system (the CLIP and the tokenizer), and of its base (weights)."""

import dataclasses
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp

from dalle2_jax import data, text
from dalle2_jax.config import inherit
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.parse import Place, expand_file
from dalle2_jax.config.sections import TokenizerConfig
from dalle2_jax.errors import ConfigError, UserError
from dalle2_jax.stages import ClipStage, EmbeddingContract, LoraStage, Variables, abstract_variables, fingerprint
from dalle2_jax.system import load
from dalle2_jax.system.loaded_stage import LoadedStage
from dalle2_jax.training.loop import Job, Start
from dalle2_jax.workdir.folder import StageFolder


def find_tokenizer(
    experiment: Experiment,
    folder: StageFolder,
    base: StageFolder | None,
    source: data.Source,
    clip: LoadedStage | None,
) -> text.Tokenizer | None:
    """Returns the tokenizer of a stage that reads text: CLIP's if it requires CLIP, else its own."""
    config = experiment.spec.text
    if not experiment.spec.reads_text or config is None:
        return None
    return clip.tokenizer if clip and config.kind != "labels" else own_tokenizer(folder, base, config, source)


def own_tokenizer(
    folder: StageFolder, base: StageFolder | None, config: TokenizerConfig, source: data.Source
) -> text.Tokenizer:
    """Returns a stage's own tokenizer: that of its checkpoints, else its base's, else as its config has it."""
    if inherit.resumes(folder, base):  # without a checkpoint, the folder may hold files of an aborted run
        return text.load_tokenizer(folder.path / "tokenizer")
    if base or config.path:
        return text.load_tokenizer(load.tokenizer_path(base) if base else config.path)
    kinds = {
        "sentencepiece": lambda size: text.train_sentencepiece(source.captions(20_000), size),
        "clip": text.clip_tokenizer,
        "glide": text.glide_tokenizer,
        "labels": text.LabelTokenizer,
    }
    place = Place("config", "text.kind")
    return place.choose(str(place), config.kind, kinds)(config.vocab_size)


def find_clip(
    experiment: Experiment,
    folder: StageFolder,
    base: StageFolder | None,
    source: data.Source,
    mesh: jax.sharding.Mesh,
    page: str,
) -> LoadedStage | None:
    """Returns the CLIP that a stage requires: of its system, else of its base's. None if it requires none.

    For data with stored embeddings it has no weights, and is that of the data where neither system has a CLIP yet.

    Raises:
      ContractError: it is not the CLIP of the stage's checkpoints, of the base, or of the stored embeddings.
      UserError: there is none.
    """
    if "clip" not in experiment.requires:
        return None
    stored = source.stored_embeddings
    homes = [folder.root, *([base.root] if base else []), *([stored.path] if stored else [])]
    home = next((root for root in homes if StageFolder(root, "clip").exists()), None)
    if home is None and stored:
        raise UserError(
            f"neither {folder.root} nor {stored.path} has a clip to go with the embeddings: link the one that made them"
        )
    if home is None:
        raise UserError(load.missing_stage(folder.root, "clip", page))
    clip_folder = StageFolder(home, "clip")
    clip = load.describe_clip(clip_folder) if stored else load.load_stage(home, "clip", mesh)
    if clip.contract is None:
        raise UserError(load.missing_stage(home, "clip", page))
    if stored:
        path = pathlib.Path(stored.path) / "clip" / "contract.json"
        expand_file(EmbeddingContract, stored.contract, path).check(
            clip.contract,
            f"{stored.path} holds other CLIP embeddings than those of {clip_folder.path}",
            "embed the data with this clip, or use a --workdir without a clip, or with that one",
        )
    if inherit.resumes(folder, base):
        check_contract(folder, clip.contract)
    elif base:
        inherit.check_contract(base, clip_folder)
    return clip


def check_contract(folder: StageFolder, contract: EmbeddingContract) -> None:
    """Raises ContractError unless a stage's checkpoints were trained under the contract of the system's CLIP."""
    stored = inherit.stored_contract(folder)
    if stored is not None:
        stored.check(
            contract,
            f"{folder.path} was trained with another clip than that of its system",
            f"remove {folder.path} to train it again, or put back that clip",
        )


# --- the base -------------------------------------------------------------------------------


def start_from_base(
    job: Job, base: StageFolder, experiment: Experiment, clip: ClipStage | None
) -> tuple[Job, str | None]:
    """Makes a job start from ``base``, or continue from its own checkpoint.

    The base of a LoRA, and the teacher of a distilled stage, is loaded in both cases, into the job's ``frozen``.

    Args:
      job: of the run.
      base: the stage that ``experiment.init_from`` leads to.
      experiment: of the run.
      clip: the CLIP that the stage requires.

    Returns:
      The job, and the fingerprint of the weights that it starts from; None if it continues.

    Raises:
      UserError: the base cannot be loaded, or be the teacher that the experiment describes; a LoRA that fits no kernel.
    """
    abstract_variables(experiment.trained(job.stage))  # raises where a LoRA's targets match no kernel
    loaded, identity = None, None
    if not inherit.resumes(job.folder, base):
        loaded = load.load_stage(base.root, base.stage, job.mesh, clip)
        identity = fingerprint(loaded.variables.params)
        if experiment.spec.distilled:
            _check_teacher(loaded, experiment)
    if experiment.lora is None and not experiment.spec.distilled:
        return dataclasses.replace(job, start=_start(job, loaded)), identity
    variables = load.load_base(job.folder, experiment, job.mesh, clip) if loaded is None else loaded.variables
    if experiment.lora is not None:
        return _with_lora(job, experiment, variables, loaded), identity
    teacher = Variables(job.stage.adapted(variables.params), variables.stats)
    start = _start(job, loaded)
    if start.params is not None:  # those of the start are donated
        start = start._replace(params=jax.tree.map(jnp.copy, start.params))
    return dataclasses.replace(job, start=start, frozen={**job.frozen, job.stage.name: teacher}), identity


def _start(job: Job, loaded: LoadedStage | None) -> Start:
    """Returns the variables of a base that has been loaded, for the job's network."""
    return Start() if loaded is None else Start(job.stage.adapted(loaded.variables.params), loaded.variables.stats)


def _with_lora(job: Job, experiment: Experiment, base: Variables, loaded: LoadedStage | None) -> Job:
    """Returns a job that trains the experiment's LoRA of the job's stage."""
    stage = cast(LoraStage, experiment.trained(job.stage))
    frozen = {**job.frozen, stage.name: stage.frozen_part(base)}
    base_preview = job.hooks.preview

    def preview(variables: Variables, step: int) -> None:
        if base_preview is not None:
            base_preview(stage.merged(frozen, variables), step)

    return dataclasses.replace(
        job,
        stage=stage,
        frozen=frozen,
        start=_start(job, loaded)._replace(params=None),
        hooks=dataclasses.replace(job.hooks, preview=base_preview and preview),
    )


def _check_teacher(loaded: LoadedStage, experiment: Experiment) -> None:
    """Raises ConfigError unless a stage can be sampled as the section ``teacher`` of an experiment has it."""
    try:
        cast(Any, loaded.stage).check_sampling(cast(Any, experiment.spec).teacher)
    except UserError as error:
        message = f"config.teacher: the stage of config.init_from cannot be sampled in this way: {error}"
        raise ConfigError(message, "teacher") from error
