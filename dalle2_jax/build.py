"""The hall: configs become typed, frozen objects here, and nowhere else is a ConfigDict seen.

Past this file there is no string to look up and no field to misspell.
"""

import dataclasses
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from dalle2_jax import data, stages, text
from dalle2_jax.generation.system import Member, check_agreement
from dalle2_jax.models.clip import ClipConfig
from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.models.prior import PriorConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.models.vit import VisionConfig
from dalle2_jax.stages import ClipStage, EmbeddingContract, Stage, Variables
from dalle2_jax.stages.base import fingerprint
from dalle2_jax.training.loop import Job, RunConfig
from dalle2_jax.training.optim import OptimConfig, make_optimizer
from dalle2_jax.training.sharding import MeshConfig, make_mesh, tree_shardings, with_shardings
from dalle2_jax.types import UsageError, UserError, choose
from dalle2_jax.workdir import Checkpoints, StageFolder

STAGES = ("clip", "prior", "decoder", "upsampler_1", "upsampler_2")
SECTIONS = ("stage", "workers", "data", "text", "model", "embedding", "conditioning", "diffusion", "sampling", "optim", "mesh")
READS_TEXT = ("clip", "prior", "decoder")
RUN_FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}
VISION = {"vit": VisionConfig, "resnet": ResNetConfig}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The tokenizer of a run: ``path`` names a trained one; else one is trained on the data's captions."""

    vocab_size: int = 400
    context_length: int = 77
    path: str = ""


# --- sections to dataclasses ---------------------------------------------------------------


def expand(cls: type, section: Mapping[str, Any], where: str, **derived: Any) -> Any:
    """Makes a dataclass of a config section.

    Args:
      cls: a dataclass; nested dataclasses are made of nested sections.
      section: its fields, any of which may be left to the default.
      where: the section's name, for errors.
      **derived: fields that follow from other parts of the system and may not be in the section.

    Raises:
      UserError: an unknown field (offers the nearest), or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init and field.name not in derived}
    values = dict(derived)
    for key, value in section.items():
        if key in derived:
            raise UsageError(f"config.{where}.{key} follows from the rest of the system: leave it out")
        choose(f"field of config.{where}", key, known)
        values[key] = _convert(hints[key], value, f"{where}.{key}")
    try:
        return cls(**values)
    except TypeError as error:  # a required field is missing
        raise UsageError(f"config.{where}: {str(error).split('__init__() ')[-1]}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    if isinstance(value, Mapping):
        nested = [option for option in options if dataclasses.is_dataclass(option)]
        if len(nested) == 1:
            return expand(nested[0], value, where)
        if nested:
            return _expand_kind(VISION, value, where)
    kinds = tuple(typing.get_origin(option) or option for option in options)
    if isinstance(value, list | tuple) and tuple in kinds:
        return tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        return float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise UsageError(f"config.{where} must be {expected}, not {value!r}")
    return value


def _expand_kind(kinds: Mapping[str, type], section: Mapping[str, Any], where: str) -> Any:
    fields = dict(section)
    kind = fields.pop("kind", None)
    return expand(choose(f"config.{where}.kind", kind, kinds), fields, where)


def _without(section: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in names}


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
    name = _stage_name(config)
    for key in config:
        choose("field of config", key, {**RUN_FIELDS, **dict.fromkeys(SECTIONS)})
    if name == "clip":
        return _build_clip(config, vocab_size)
    common = {
        "name": name,
        "diffusion": expand(stages.DiffusionConfig, config["diffusion"], "diffusion"),
        "sampling": expand(stages.SamplingConfig, config["sampling"], "sampling"),
    }
    conditioning = config.get("conditioning", {})
    if name.startswith("upsampler"):
        model = expand(UNetConfig, config["model"], "model")
        return expand(stages.UpsamplerStage, conditioning, "conditioning", model=model, **common)
    build_model, cls = (
        (_prior_model, stages.PriorStage) if name == "prior" else (_decoder_model, stages.DecoderStage)
    )
    model = build_model(config, vocab_size, clip)
    return expand(cls, conditioning, "conditioning", model=model, clip=clip, **common)


def _stage_name(config: Mapping[str, Any]) -> str:
    name = config.get("stage", "")
    choose("stage", name, dict.fromkeys(STAGES))
    return name


def _build_clip(config: Mapping[str, Any], vocab_size: int) -> ClipStage:
    tower = _without(config["model"]["text"])
    text_config = expand(
        ClipConfig.__dataclass_fields__["text"].default_factory,
        tower,
        "model.text",
        vocab_size=vocab_size,
        context_length=config["text"]["context_length"],
    )
    model = expand(ClipConfig, _without(config["model"], "text"), "model", text=text_config)
    return ClipStage(model, expand(stages.EmbeddingConfig, config.get("embedding", {}), "embedding"))


def _prior_model(config: Mapping[str, Any], vocab_size: int, clip: ClipStage) -> PriorConfig:
    tokens = config["model"].get("text_input", "tokens") == "tokens"
    return expand(
        PriorConfig,
        config["model"],
        "model",
        embed_dim=clip.model.embed_dim,
        context_length=config["text"]["context_length"],
        vocab_size=vocab_size if tokens else None,
        text_width=None if tokens else clip.model.text.width,
    )


def _decoder_model(config: Mapping[str, Any], vocab_size: int, clip: ClipStage) -> DecoderConfig:
    text_config = None
    if config["model"].get("text") is not None:
        text_config = expand(
            type(clip.model.text),
            config["model"]["text"],
            "model.text",
            vocab_size=vocab_size,
            context_length=config["text"]["context_length"],
        )
    return expand(
        DecoderConfig,
        _without(config["model"], "text"),
        "model",
        text=text_config,
        image_emb_dim=clip.model.embed_dim,
        text_width=clip.model.text.width if config["model"].get("text_input") == "clip" else None,
    )


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
    config = stored
    if step < config["total_steps"]:
        raise UserError(
            f"stage {name} in {root} is unfinished ({step} of {config['total_steps']} steps): {_how_to_train(root, name)}"
        )
    tokenizer = text.load_tokenizer(folder.path / "tokenizer") if name in READS_TEXT else None
    stage = build_stage(config, tokenizer and tokenizer.vocab_size, clip)
    abstract = jax.eval_shape(stage.init, jax.random.key(0))
    shapes = with_shardings(abstract, tree_shardings(abstract, mesh))
    restored = Checkpoints(folder).restore({"ema": shapes.params, "stats": shapes.stats})
    for message in restored.skipped:
        print(message)
    contract = folder.read_json("contract.json")
    return Member(
        stage=stage,
        variables=Variables(restored.trees["ema"], restored.trees["stats"]),
        step=restored.step,
        contract=contract and expand(EmbeddingContract, contract, f"{folder.path}/contract.json"),
        tokenizer=tokenizer,
        context_length=config["text"]["context_length"] if tokenizer else 0,
    )


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
        if clip is None and name in ("prior", "decoder"):
            raise UserError(f"stage {name} needs stage clip: {_how_to_train(root, 'clip')}")
        members[name] = load_member(root, name, mesh, clip)
    check_agreement(members, str(root))
    return members


def load_cascade(root: pathlib.Path, mesh: jax.sharding.Mesh) -> dict[str, Member]:
    """Loads a system that can go from captions to pictures. UserError if it lacks a stage for that."""
    members = load_system(root, mesh)
    for needed in ("clip", "prior", "decoder"):
        if needed not in members:
            raise UserError(missing_stage(root, needed))
    return members


def open_source(config: Mapping[str, Any], split: str) -> data.Source:
    """Opens a split of the data set that a stage's config names."""
    return data.make_source(_expand_kind(data.KINDS, config["data"], "data"), split)


def missing_stage(root: pathlib.Path, name: str) -> str:
    """Says that a system lacks a stage, and what to do."""
    return f"system {root} has no trained stage {name}: {_how_to_train(root, name)}"


def _how_to_train(root: pathlib.Path, name: str) -> str:
    """The command that trains a stage, guessed from what trained its neighbours."""
    files = [StageFolder(root, other).read_json("run.json") for other in STAGES]
    family = next((run["config"].split(":")[0] for run in files if run), "configs/shapes.py")
    return f"train it with `python train.py --config {family}:{name} --workdir {root}`"


# --- training -------------------------------------------------------------------------------


def build_job(config: ConfigDict, root: pathlib.Path, config_path: str) -> Job:
    """Assembles a training run and claims its folder; everything that can be wrong is found first.

    Args:
      config: of one stage.
      root: the system's workdir.
      config_path: what the user gave as --config, for later messages.
    """
    config = config.to_dict()
    name = _stage_name(config)
    run = expand(RunConfig, {key: value for key, value in config.items() if key in RUN_FIELDS}, "")
    mesh = make_mesh(expand(MeshConfig, config["mesh"], "mesh"))
    if run.batch_size % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise UserError(f"batch_size {run.batch_size} does not divide over the mesh {dict(mesh.shape)}")
    folder = StageFolder(root, name)
    source = open_source(config, "train")
    members = {"clip": load_member(root, "clip", mesh)} if name in ("prior", "decoder") else {}
    clip = members.get("clip")
    tokenizer, context_length = None, 2
    if name in READS_TEXT:
        text_config = expand(TextConfig, config["text"], "text")
        tokenizer = clip.tokenizer if clip else _tokenizer(folder, text_config, source)
        context_length = text_config.context_length
    stage = build_stage(config, tokenizer and tokenizer.vocab_size, clip and clip.stage)
    optim = expand(OptimConfig, config["optim"], "optim")
    optimizer = make_optimizer(optim, run.total_steps)
    stream = data.make_stream(
        source,
        tokenizer,
        context_length,
        run.batch_size,
        run.seed,
        jax.process_index(),
        jax.process_count(),
        num_workers=config.get("workers", 0),
    )
    if clip:
        _check_contract(folder, clip.contract)
    if jax.process_index() == 0:
        folder.claim(config)
        folder.write_json("run.json", {"config": config_path})
        if tokenizer:
            tokenizer.save(folder.path / "tokenizer")
        if clip:
            folder.write_json("contract.json", dataclasses.asdict(clip.contract))
    frozen = {member: loaded.variables for member, loaded in members.items()}
    return Job(run, stage, frozen, optimizer, optim.ema_decay, stream, mesh, folder)


def _tokenizer(folder: StageFolder, config: TextConfig, source: data.Source) -> text.Tokenizer:
    """The stage's own tokenizer if it has one, else the one the config names, else a new one."""
    if (folder.path / "tokenizer").is_dir():
        return text.load_tokenizer(folder.path / "tokenizer")
    if config.path:
        return text.load_tokenizer(config.path)
    return text.train_sentencepiece(source.captions(20_000), config.vocab_size)


def _check_contract(folder: StageFolder, contract: EmbeddingContract) -> None:
    stored = folder.read_json("contract.json")
    if stored is not None and folder.latest_step() is not None and stored != dataclasses.asdict(contract):
        raise UserError(
            f"{folder.path} was trained with another clip ({stored['clip']}) than the one now beside it "
            f"({contract.clip}): remove {folder.path} to train it again, or put back that clip"
        )


def record_contract(job: Job, params: Any) -> None:
    """Writes the contract of a CLIP that has finished training; other stages have theirs already."""
    stage = job.stage
    if isinstance(stage, ClipStage):
        identity = fingerprint(params)
        if jax.process_index() == 0:
            contract = EmbeddingContract(
                identity, stage.model.embed_dim, stage.embedding.normalisation, stage.embedding.scale
            )
            job.folder.write_json("contract.json", dataclasses.asdict(contract))
