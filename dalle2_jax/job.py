"""A config becomes a training run: everything it needs, found or made, and its folder claimed. The only file that sees
a ConfigDict.
"""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dalle2_jax import build, data, finetune, text
from dalle2_jax.generation import Member, make_preview
from dalle2_jax.networks import TextConfig, borrows_clip, reads_text, text_config
from dalle2_jax.sections import expand
from dalle2_jax.stages import (
    ArPriorStage,
    ClipStage,
    DecoderStage,
    EmbeddingContract,
    LoraStage,
    PriorStage,
    Stage,
    UpsamplerStage,
    Variables,
)
from dalle2_jax.stages.base import fingerprint
from dalle2_jax.stages.lora import merge
from dalle2_jax.training.loop import Job, RunConfig
from dalle2_jax.training.metrics import from_all_hosts
from dalle2_jax.training.optim import OptimConfig, make_optimizer
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.types import UsageError, UserError, choose
from dalle2_jax.workdir import StageFolder, link_stages

COUNTED = ("total_steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints")

PREVIEWED = 12
"""Held-out pictures drawn at each ``sample_every``."""


def run_config(config: Mapping[str, Any]) -> RunConfig:
    """Returns how long a run goes, of its config. UsageError for a count below one."""
    run = expand(RunConfig, {key: value for key, value in config.items() if key in build.RUN_FIELDS}, "")
    for key in COUNTED:
        if getattr(run, key) < 1:
            raise UsageError(f"config.{key} must be at least 1, not {getattr(run, key)}")
    return run


def build_job(config: ConfigDict, root: pathlib.Path, config_path: str) -> Job:
    """Assembles a training run and claims its folder; everything that can be wrong is found first.

    With ``init_from``, the run starts from that system's stage, as ``finetune`` says; what else the workdir lacks of
    that system is linked.

    Args:
      config: of one stage.
      root: the system's workdir.
      config_path: what the user gave as --config, for later messages.
    """
    config = config.to_dict()
    choose("stage", config.get("stage", ""), dict.fromkeys(build.STAGES))
    config, base = finetune.with_base(config, root, config["stage"])
    name = build.stage_name(config, build.TRAINING)
    run = run_config(config)
    mesh = _mesh(config, run)
    folder = StageFolder(root, name)
    source = build.open_source(config, "train")
    embedded = isinstance(source, data.Embedded)
    clip = None
    if borrows_clip(config):
        clip = _described_clip(folder, base, source) if embedded else _load_clip(folder, base, mesh, config_path)
    tokenizer, context_length = None, 2
    if reads_text(config):
        spoken = text_config(config)
        shared = clip and spoken.kind != "labels"
        tokenizer = clip.tokenizer if shared else _tokenizer(folder, base, spoken, source)
        context_length = spoken.context_length
    stage = build.build_stage(config, tokenizer and tokenizer.vocab_size, clip and clip.stage)
    source = _telling(source, stage, context_length) if embedded else source
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
        degrading=stage.degrading if isinstance(stage, UpsamplerStage) else None,
    )
    frozen = {"clip": clip.variables} if clip and not embedded else {}
    preview = None
    if run.sample_every and not isinstance(stage, PriorStage | ArPriorStage):
        preview = _preview(config, stage, frozen, tokenizer, context_length, folder)
    job = Job(run, stage, frozen, optimizer, optim.ema_decay, stream, mesh, folder, preview, rejected=_refused(source))
    job, identity = _tuned(job, base, config, clip and clip.stage) if base else (job, None)
    if jax.process_index() == 0:
        if base and folder.is_link_to(base):
            folder.path.unlink()
        _claim(folder, config, config_path, tokenizer, clip)
        if identity is not None:
            folder.write_json("base.json", {"weights": identity})
            link_stages(base.root, root, finetune.strangers(base, folder))
    multihost_utils.sync_global_devices(f"{folder.path} is claimed")
    return job


def _mesh(config: Mapping[str, Any], run: RunConfig) -> jax.sharding.Mesh:
    mesh = make_mesh(expand(MeshConfig, config["mesh"], "mesh"))
    if run.batch_size % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise UserError(f"batch_size {run.batch_size} does not divide over the mesh {dict(mesh.shape)}")
    return mesh


def _preview(
    config: Mapping[str, Any],
    stage: Stage,
    frozen: Mapping[str, Variables],
    tokenizer: text.Tokenizer | None,
    context_length: int,
    folder: StageFolder,
) -> Callable[[Variables, int], None] | None:
    """Returns what draws held-out pictures while a stage trains, None for one without pictures."""
    held_out = build.open_source(config, "val")
    held_out = _telling(held_out, stage, context_length) if isinstance(held_out, data.Embedded) else held_out
    shown = range(min(PREVIEWED, len(held_out)))
    batch, captions = data.fixed_batch(held_out, tokenizer, context_length, shown)
    return make_preview(stage, frozen, batch, captions, folder.path / "samples")


def _tuned(job: Job, base: StageFolder, config: Mapping[str, Any], clip: ClipStage | None) -> tuple[Job, str | None]:
    """Makes a job start from ``base``, or go on from there, and train a LoRA if the config says so.

    Returns:
      The job, and the fingerprint of the weights that it starts from, None if it goes on.
    """
    stage, start, identity = build.trained_stage(job.stage, config), Variables(None, None), None
    jax.eval_shape(stage.init, jax.random.key(0))  # whether a LoRA's targets are there
    if not finetune.resumes(job.folder, base):
        start = build.load_member(base.root, base.stage, job.mesh, clip).variables
        identity = fingerprint(start.params)
    if stage is job.stage:
        return dataclasses.replace(job, start=start), identity
    borrowed = stage.borrowed(start if identity else build.load_base(job.folder, config, job.mesh, clip))

    def preview(variables: Variables, step: int) -> None:
        job.preview(stage.whole(borrowed, variables), step)

    lora = dataclasses.replace(
        job,
        stage=stage,
        frozen={**job.frozen, stage.name: borrowed},
        start=start._replace(params=None),
        preview=job.preview and preview,
    )
    return lora, identity


def _claim(
    folder: StageFolder,
    config: Mapping[str, Any],
    config_path: str,
    tokenizer: text.Tokenizer | None,
    clip: Member | None,
) -> None:
    """Writes what every run's folder holds before the first step."""
    folder.claim(config)
    folder.write_json("run.json", {"config": config_path})
    if tokenizer:
        tokenizer.save(folder.path / "tokenizer")
    if clip:
        folder.write_json("contract.json", dataclasses.asdict(clip.contract))


def _load_clip(folder: StageFolder, base: StageFolder | None, mesh: jax.sharding.Mesh, config_path: str) -> Member:
    """Loads the CLIP beside a stage, or beside its base, whose link it will be, and checks that it is the one meant."""
    homes = [folder.root, base.root] if base else [folder.root]
    home = next((root for root in homes if StageFolder(root, "clip").exists()), None)
    if home is None:
        raise UserError(build.missing_stage(folder.root, "clip", config_path))
    clip = build.load_member(home, "clip", mesh)
    _check_meant(folder, base, StageFolder(home, "clip"), clip.contract)
    return clip


def _described_clip(folder: StageFolder, base: StageFolder | None, source: data.Embedded) -> Member:
    """Describes the CLIP whose embeddings a stage is trained on, without its weights.

    It is the one beside the stage or its base, or, where there is none yet, the one that the embeddings came with:
    then sampling waits until that CLIP is put beside the stage.

    Raises:
      UserError: the one beside it spoke other embeddings.
    """
    homes = [folder.root, *([base.root] if base else []), source.path]
    home = next((StageFolder(root, "clip") for root in homes if StageFolder(root, "clip").exists()), None)
    if home is None:
        raise UserError(
            f"neither {folder.root} nor {source.path} has a clip to go with the embeddings: link the one that made them"
        )
    clip = build.describe_clip(home)
    ours = dataclasses.asdict(clip.contract)
    theirs = source.contract
    differing = [f"{key} {theirs.get(key)!r} against {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]
    if differing:
        raise UserError(
            f"{source.path} holds other CLIP embeddings than those of {home.path} ({', '.join(differing)}): embed the "
            "data with this clip, or use a --workdir without a clip, or with that one"
        )
    _check_meant(folder, base, home, clip.contract)
    return clip


def _check_meant(folder: StageFolder, base: StageFolder | None, clip: StageFolder, contract: EmbeddingContract) -> None:
    """Checks that a CLIP is the one that a stage, or its base, was trained with."""
    if finetune.resumes(folder, base):
        _check_contract(folder, contract)
    elif base:
        finetune.check_contract(base, clip)


def _refused(source: data.Source | data.Embedded) -> Callable[[], Mapping[str, int]]:
    """Returns what counts refused records: those of the opening, which every host saw, and what any refused since."""
    since: Callable[[], Mapping[str, str]] = getattr(source, "refusals", dict)
    at_opening = Counter(getattr(source, "rejected", {})) - Counter(since().values())
    known: dict[str, str] = {}

    def count() -> Counter[str]:
        known.update(from_all_hosts({place: cause for place, cause in since().items() if place not in known}))
        return at_opening + Counter(known.values())

    return count


def _telling(source: data.Embedded, stage: Stage, context_length: int) -> data.Embedded:
    """Returns the embeddings, with the pictures or without, as the stage reads them.

    Raises:
      UserError: it is trained on pictures, and there are none.
    """
    paired = isinstance(source, data.PairedSource)
    if isinstance(stage, PriorStage | ArPriorStage):
        return (source.embeddings if paired else source).telling(stage.said, context_length)
    if not paired:
        raise UserError(f"stage {stage.name} is trained on pictures, and {source} has none: name other data")
    return source.telling(stage.said, context_length) if isinstance(stage, DecoderStage) else source.alone()


def _tokenizer(
    folder: StageFolder, base: StageFolder | None, config: TextConfig, source: data.Source
) -> text.Tokenizer:
    """The stage's own tokenizer once it is in use, else its base's, else the one the config names, else a new one."""
    if finetune.resumes(folder, base):  # before that, the folder may be another config's false start
        return text.load_tokenizer(folder.path / "tokenizer")
    if base or config.path:
        return text.load_tokenizer(base.path / "tokenizer" if base else config.path)
    kinds = {
        "sentencepiece": lambda size: text.train_sentencepiece(source.captions(20_000), size),
        "clip": text.clip_tokenizer,
        "glide": text.glide_tokenizer,
        "labels": text.LabelTokenizer,
    }
    return choose("config.text.kind", config.kind, kinds)(config.vocab_size)


def _check_contract(folder: StageFolder, contract: EmbeddingContract) -> None:
    stored = folder.read_json("contract.json")
    if stored is not None and stored != dataclasses.asdict(contract):
        raise UserError(
            f"{folder.path} was trained with another clip ({stored['clip']}) than the one now beside it "
            f"({contract.clip}): remove {folder.path} to train it again, or put back that clip"
        )


def record_contract(job: Job, params: Any) -> None:
    """Writes the contract of a CLIP that has finished training; other stages have theirs already."""
    stage = job.stage
    if isinstance(stage, LoraStage):
        stage, params = stage.inner, merge(job.frozen[stage.name].params, params, stage.config)
    if isinstance(stage, ClipStage):
        identity = fingerprint(params)
        if jax.process_index() == 0:
            contract = EmbeddingContract(
                identity, stage.model.embed_dim, stage.embedding.normalisation, stage.embedding.scale
            )
            job.folder.write_json("contract.json", dataclasses.asdict(contract))
