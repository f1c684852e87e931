"""The hall: configs become typed, frozen objects here, and systems on disk become loaded stages.

Past this file and ``job.py`` there is no string to look up and no field to misspell.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax

from dalle2_jax import data, finetune, stages, text
from dalle2_jax.diffusion import NoiseMoments
from dalle2_jax.generation import PRIORS, Member, check_agreement
from dalle2_jax.networks import (
    ar_prior_model,
    borrows_clip,
    clip_model,
    decoder_model,
    prior_model,
    reads_text,
    text_config,
    upsampler_model,
)
from dalle2_jax.sections import expand, expand_kind
from dalle2_jax.stages import ClipStage, EmbeddingContract, LoraConfig, LoraStage, Stage, Variables
from dalle2_jax.stages.base import fingerprint
from dalle2_jax.training.loop import RunConfig
from dalle2_jax.training.sharding import tree_shardings, with_shardings
from dalle2_jax.types import UsageError, UserError, choose
from dalle2_jax.workdir import Checkpoints, StageFolder

STAGES = ("clip", "prior", "ar_prior", "decoder", "upsampler_1", "upsampler_2")
DIFFUSED = ("prior", "decoder", "upsampler_1", "upsampler_2")
RUN_FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}
TOP = ("stage", "workers", "init_from")

SECTIONS = {
    # section: the stages whose config must have it, and those whose config may
    "data": ((), STAGES),
    "model": (STAGES, ()),
    "optim": ((), STAGES),
    "mesh": ((), STAGES),
    "lora": ((), STAGES),
    "text": ((), STAGES),  # see networks.reads_text
    "diffusion": (DIFFUSED, ()),
    "sampling": (DIFFUSED, ("ar_prior",)),
    "embedding": ((), ("clip",)),
    "conditioning": ((), ("ar_prior", *DIFFUSED)),
}

TRAINING = ("data", "optim", "mesh")
"""Sections without which a stage can be built, as an imported one is, but not trained."""


# --- stages ---------------------------------------------------------------------------------


def build_stage(config: Mapping[str, Any], vocab_size: int | None, clip: ClipStage | None) -> Stage:
    """Returns the stage a config describes.

    Args:
      config: of one stage.
      vocab_size: of the run's tokenizer; None for a stage that reads no text.
      clip: the CLIP beside it, for the stages that borrow one.

    Raises:
      UserError: an unknown stage, section, field or value.
    """
    name = stage_name(config)
    if name == "clip":
        return _build_clip(config, vocab_size)
    conditioning = config.get("conditioning", {})
    if name == "ar_prior":
        sampling = expand(stages.ArSamplingConfig, config.get("sampling", {}), "sampling")
        model = ar_prior_model(config, vocab_size, clip.model)
        parts = {"name": name, "model": model, "clip": clip, "sampling": sampling}
        return expand(stages.ArPriorStage, conditioning, "conditioning", **parts)
    common = {
        "name": name,
        "moments": None,  # measured once the stage is trained, see load_member
        "diffusion": expand(stages.DiffusionConfig, config["diffusion"], "diffusion"),
        "sampling": expand(stages.SamplingConfig, config["sampling"], "sampling"),
    }
    if name.startswith("upsampler"):
        model = upsampler_model(config, vocab_size)
        return expand(stages.UpsamplerStage, conditioning, "conditioning", model=model, **common)
    build_model, cls = (
        (prior_model, stages.PriorStage) if name == "prior" else (decoder_model, stages.DecoderStage)
    )
    model = build_model(config, vocab_size, clip and clip.model)
    return expand(cls, conditioning, "conditioning", model=model, clip=clip, **common)


def needed(root: pathlib.Path, name: str) -> tuple[str, ...]:
    """Returns the stages of a system without which one of them cannot be loaded, and itself."""
    stored = StageFolder(root, name).read_json("config.json")
    return ("clip", name) if stored is not None and borrows_clip(stored) else (name,)


def stage_name(config: Mapping[str, Any], wanted: tuple[str, ...] = ()) -> str:
    """Returns the name of a config's stage, whose sections are all there, and those ``wanted``, and no others."""
    name = config.get("stage", "")
    choose("stage", name, dict.fromkeys(STAGES))
    sections = [key for key, (must, may) in SECTIONS.items() if name in must or name in may]
    for key in config:
        choose(f"field of stage {name}'s config", key, dict.fromkeys((*TOP, *RUN_FIELDS, *sections)))
    for key in sections:
        must = name in SECTIONS[key][0] or key in wanted or (key == "text" and reads_text(config))
        if (key in config or must) and not isinstance(config.get(key), Mapping):
            raise UsageError(f"config of stage {name} needs a section {key}")
    return name


def _build_clip(config: Mapping[str, Any], vocab_size: int) -> ClipStage:
    embedding = expand(stages.EmbeddingConfig, config.get("embedding", {}), "embedding")
    return ClipStage(clip_model(config, vocab_size), embedding)


# --- loading --------------------------------------------------------------------------------


def load_member(root: pathlib.Path, name: str, mesh: jax.sharding.Mesh, clip: ClipStage | None = None) -> Member:
    """Loads one finished stage of a system, its averaged weights sharded over ``mesh``.

    Raises:
      UserError: the stage is missing or unfinished; the message names the command that trains it.
    """
    folder = StageFolder(root, name)
    stored = folder.read_json("config.json")
    step = folder.latest_step()
    if stored is None or step is None:
        raise UserError(missing_stage(root, name))
    config, total = stored, stored.get("total_steps", RunConfig.total_steps)
    contract = folder.read_json("contract.json")
    if step < total or (name == "clip" and contract is None):
        raise UserError(f"stage {name} in {root} is unfinished ({step} of {total} steps): {_how_to_train(root, name)}")
    tokenizer = _load_tokenizer(folder) if reads_text(config) else None
    stage = build_stage(config, tokenizer.vocab_size if tokenizer else _vocab_size(config), clip)
    trained = trained_stage(stage, config)
    abstract = jax.eval_shape(trained.init, jax.random.key(0))
    shapes = with_shardings(abstract, tree_shardings(abstract, mesh))
    restored = Checkpoints(folder).restore({"ema": shapes.params, "stats": shapes.stats})
    for message in restored.skipped:
        print(f"warning: {message}; step {restored.step} is used", file=sys.stderr)
    variables = Variables(restored.trees["ema"], restored.trees["stats"])
    if isinstance(trained, LoraStage):
        variables = trained.whole(trained.borrowed(load_base(folder, config, mesh, clip)), variables)
    measured = folder.read_json("moments.json")
    if measured is not None and measured["step"] == restored.step:
        moments = NoiseMoments(tuple(measured["eps"]), measured["x_0"])
        stage = dataclasses.replace(stage, moments=moments)
    return Member(
        stage=stage,
        variables=variables,
        step=restored.step,
        contract=contract and expand(EmbeddingContract, contract, f"{folder.path}/contract.json"),
        tokenizer=tokenizer,
        context_length=text_config(config).context_length if reads_text(config) else 0,
    )


def describe_clip(folder: StageFolder) -> Member:
    """Returns a CLIP without its weights: all that a stage needs of it which is trained on its embeddings.

    Raises:
      UserError: its config or contract is missing.
    """
    config, contract = folder.read_json("config.json"), folder.read_json("contract.json")
    if config is None or contract is None:
        missing = "contract.json" if config else "config.json"
        raise UserError(f"{folder.path} has no {missing}, so it describes no trained clip: copy it from its system")
    tokenizer = _load_tokenizer(folder)
    return Member(
        stage=build_stage(config, tokenizer.vocab_size if tokenizer else _vocab_size(config), None),
        variables=Variables({}, {}),
        step=0,
        contract=expand(EmbeddingContract, contract, f"{folder.path}/contract.json"),
        tokenizer=tokenizer,
        context_length=text_config(config).context_length,
    )


def write_description(system: pathlib.Path, out: pathlib.Path) -> None:
    """Writes to ``out/clip`` what `describe_clip` reads of a system's clip, or checks that it is there already.

    Raises:
      UserError: another clip is described there.
    """
    theirs, ours = StageFolder(out, "clip"), StageFolder(system, "clip")
    stored, contract = theirs.read_json("contract.json"), ours.read_json("contract.json")
    if stored is not None and stored != contract:
        raise UserError(
            f"{out} holds embeddings of another clip ({stored}) than that of {system} ({contract}): use another --out"
        )
    if stored is None:
        _load_tokenizer(ours).save(theirs.path / "tokenizer")
        theirs.write_json("config.json", ours.read_json("config.json"))
        theirs.write_json("contract.json", contract)


def trained_stage(stage: Stage, config: Mapping[str, Any]) -> Stage:
    """What is trained of a stage: all of it, or a LoRA."""
    return LoraStage(stage, expand(LoraConfig, config["lora"], "lora")) if "lora" in config else stage


def load_base(
    folder: StageFolder, config: Mapping[str, Any], mesh: jax.sharding.Mesh, clip: ClipStage | None
) -> Variables:
    """Loads what a LoRA in ``folder`` was trained on, and on nothing else can be merged into."""
    base = finetune.base_of(folder, config)
    variables = load_member(base.root, base.stage, mesh, clip).variables
    finetune.check_fingerprint(folder, base, fingerprint(variables.params))
    return variables


def _load_tokenizer(folder: StageFolder) -> text.Tokenizer | None:
    """Returns a stage's tokenizer; None for an imported one that came without."""
    path = folder.path / "tokenizer"
    return None if folder.read_json("source.json") and not path.exists() else text.load_tokenizer(path)


def _vocab_size(config: Mapping[str, Any]) -> int | None:
    return text_config(config).vocab_size if reads_text(config) else None


def load_system(root: pathlib.Path, mesh: jax.sharding.Mesh, names: tuple[str, ...] = ()) -> dict[str, Member]:
    """Loads stages of a system and checks that they agree.

    Args:
      root: the workdir.
      mesh: where the weights go.
      names: the stages needed; all that were started there if empty.

    Raises:
      UserError: there is no such system, a stage is missing or unfinished, or two disagree.
    """
    if not root.is_dir():
        raise UserError(f"there is no system at {root}: train one with train.py --workdir {root}")
    names = names or tuple(name for name in STAGES if StageFolder(root, name).exists())
    if not names:
        raise UserError(f"{root} holds no stage: train one with train.py --workdir {root}")
    members: dict[str, Member] = {}
    for name in sorted(names, key=STAGES.index):
        clip = members["clip"].stage if "clip" in members else None
        if clip is None and "clip" in needed(root, name)[:-1]:
            raise UserError(f"stage {name} needs stage clip: {_how_to_train(root, 'clip')}")
        members[name] = load_member(root, name, mesh, clip)
    check_agreement(members, str(root))
    return members


def load_cascade(
    root: pathlib.Path, mesh: jax.sharding.Mesh, prior: str | None = None, embeds: bool = True
) -> dict[str, Member]:
    """Loads the stages of a system that lead to pictures, with at most one prior.

    Args:
      root: the workdir.
      mesh: where the weights go.
      prior: a kind of ``PRIORS``; None takes the first that was started there.
      embeds: whether a prior is needed, as it is where image embeddings come from captions.

    Raises:
      UserError: there is no such system, it lacks a stage for that, or two stages disagree.
    """
    started = [name for name in STAGES if StageFolder(root, name).exists()]
    if not started:
        return load_system(root, mesh)  # says what is wrong
    stage = PRIORS.get(prior) or next((name for name in PRIORS.values() if name in started), "prior")
    decoder = StageFolder(root, "decoder").read_json("config.json")
    told = {"clip", stage} if embeds else {"clip"}
    needed = {"decoder"} | (told if decoder is None or borrows_clip(decoder) else set())
    names = tuple(name for name in STAGES if name in needed or (name in started and name not in PRIORS.values()))
    return load_system(root, mesh, names)


def open_source(config: Mapping[str, Any], split: str) -> data.Source | data.Embedded:
    """Opens a split of the data set that a stage's config names. UserError if it names none."""
    if "data" not in config:
        raise UserError(f"stage {config['stage']} was imported, not trained here: it names no data to measure it on")
    return data.make_source(_source_config(config["data"], "data"), split)


def _source_config(section: Mapping[str, Any], where: str) -> data.SourceConfig:
    """Expands a section that names a data set; the parts of a mixture have its resolution."""
    if section.get("kind") == "mixture":
        common = {"resolution": section["resolution"]} if "resolution" in section else {}
        parts = section.get("parts", {})
        parts = {name: _source_config({**common, **part}, f"{where}.parts.{name}") for name, part in parts.items()}
        section = {**section, "parts": parts}
    return expand_kind(data.KINDS, section, where)


def missing_stage(root: pathlib.Path, name: str, config_path: str = "") -> str:
    """Says that a system lacks a stage, and what to do; ``config_path`` as `build_job` was told it."""
    return f"system {root} has no trained stage {name}: {_how_to_train(root, name, config_path)}"


def _how_to_train(root: pathlib.Path, name: str, config_path: str = "") -> str:
    """The command that trains a stage, guessed from what trained its neighbours or is being trained."""
    files = [StageFolder(root, other).read_json("run.json") for other in STAGES]
    known = [run["config"] for run in files if run] + [config_path or "configs/shapes.py"]
    family, _, which = known[0].partition(":")
    form = "," + which.partition(",")[2] if "," in which else ""
    return f"train it with `python train.py --config {family}:{name}{form} --workdir {root}`"
