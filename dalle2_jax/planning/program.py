"""The programs of a plan: the real train step, or the real sampling program, on shapes with shardings and no arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.image_specs import UpsamplerSpec
from dalle2_jax.data import EmbeddingsConfig
from dalle2_jax.diffusion import NoiseStatistics
from dalle2_jax.errors import ConfigError
from dalle2_jax.stages import ClipStage, Stage, abstract_variables
from dalle2_jax.stages.base import CLIP_COLUMNS, select_columns
from dalle2_jax.system import programs
from dalle2_jax.training.configs import HOST
from dalle2_jax.training.optim import make_optimizer
from dalle2_jax.training.sharding import (
    batch_sharding,
    logical_axes,
    replicated,
    tree_shardings,
    with_shardings,
)
from dalle2_jax.training.step import abstract_state, make_train_step, state_shardings

GENERATED = ("image", "image_emb", "low_res")
"""Columns of a training batch that sampling generates, or is given as arrays."""


class Program(NamedTuple):
    """A traced program, and its arguments by what they are: trees of shapes with shardings."""

    traced: jax.stages.Traced
    parts: Mapping[str, Any]


def build_stage(experiment: Experiment, clip: Experiment | None) -> tuple[Stage, ClipStage | None]:
    """Returns what an experiment trains, and the CLIP that it requires; vocabularies have the sizes of the configs.

    Raises:
      ConfigError: a CLIP is required and not given.
    """
    vocab_size = experiment.spec.text.vocab_size if experiment.spec.text else None
    if "clip" not in experiment.requires:
        return experiment.trained(experiment.build(vocab_size, None)), None
    if clip is None:
        raise ConfigError(f"stage {experiment.stage} requires a clip: give its experiment as clip=", "clip")
    clip_size = clip.spec.text.vocab_size if clip.spec.text else None
    clip_stage = cast(ClipStage, clip.build(clip_size, None))
    if experiment.spec.text and experiment.spec.text.kind != "labels":
        vocab_size = clip_size
    return experiment.trained(experiment.build(vocab_size, clip_stage)), clip_stage


def train_program(experiment: Experiment, clip: Experiment | None, mesh: Mesh) -> Program:
    """Returns the train step of an experiment on a mesh, traced.

    Raises:
      ConfigError: as `build_stage` and `Experiment.check_trainable`.
    """
    stage, clip_stage = build_stage(experiment, clip)
    optim, _ = experiment.check_trainable()
    columns = batch_columns(experiment, stage)
    frozen = {name: abstract_variables(stage) for name in stage.requires if name == stage.name}
    if clip_stage is not None and clip_stage.name in stage.requires and columns != stage_columns(stage):
        frozen[clip_stage.name] = abstract_variables(clip_stage)
    optimizer = make_optimizer(optim, experiment.run.total_steps, stage.training_rules.decay)
    shardings = state_shardings(stage, optimizer, mesh, optim.ema_memory)
    state = with_shardings(abstract_state(stage, optimizer), shardings)
    frozen = with_shardings(frozen, tree_shardings(frozen, mesh))
    batch = _batch(column_shapes(experiment, stage, clip_stage, experiment.run.batch_size), columns, mesh)
    step = cast(Any, make_train_step(stage, optimizer, optim.ema_decay, shardings, optim.accumulate))
    parts = {
        "parameters": state.params,
        "averages": (state.ema, state.ema_stats),
        "optimizer": state.opt_state,
        "frozen": frozen,
        "batch": batch,
        "statistics": state.stats,
    }
    return Program(step.trace(state, frozen, _key((), mesh), batch), parts)


def state_bytes(experiment: Experiment, clip: Experiment | None, mesh: Mesh) -> int:
    """Returns the bytes of the train state on one device of a mesh; nothing is traced but the initialisation."""
    stage, _ = build_stage(experiment, clip)
    optim, _ = experiment.check_trainable()
    optimizer = make_optimizer(optim, experiment.run.total_steps, stage.training_rules.decay)
    shardings = state_shardings(stage, optimizer, mesh, optim.ema_memory)
    return device_bytes(with_shardings(abstract_state(stage, optimizer), shardings))


def sample_program(experiment: Experiment, clip: Experiment | None, mesh: Mesh) -> Program:
    """Returns the program that samples a batch from a stage with its section ``sampling``, traced.

    Raises:
      ConfigError: as `build_stage`, and for CLIP, which is not sampled.
    """
    if experiment.stage == "clip":
        raise ConfigError("clip is not sampled: plan another stage, or its training", "stage")
    stage, clip_stage = build_stage(dataclasses.replace(experiment, lora=None), clip)
    if stage.diffusion_steps is not None:  # their values do not change the program
        unit = NoiseStatistics((1.0,) * stage.diffusion_steps, 1.0)
        stage = dataclasses.replace(cast(Any, stage), noise_statistics=unit)
    size, place = experiment.run.batch_size, tree_shardings
    variables = abstract_variables(stage)
    variables = with_shardings(variables, place(variables, mesh))
    captions = tuple(name for name in stage.inputs if name not in GENERATED)
    frozen = abstract_variables(clip_stage) if clip_stage and CLIP_COLUMNS.keys() & {*captions} else None
    frozen = frozen and with_shardings(frozen, place(frozen, mesh))
    shapes = column_shapes(experiment, stage, clip_stage, size)
    columns = select_columns(captions, ()) + (("image_emb",) if "image_emb" in stage.inputs else ())
    batch = _batch(shapes, tuple(dict.fromkeys(columns)), mesh)
    if stage.image_size is not None and "low_res" in shapes:
        batch["low_res"] = _rows(shapes["low_res"], mesh)
    plan, keys = cast(Any, stage).plan(), _key((size,), mesh)
    with logical_axes(mesh):
        if stage.image_size is None:
            batch.pop("image_emb")
            candidates = cast(Any, stage).candidates
            traced = cast(Any, programs.sample_embeddings).trace(
                stage, candidates, variables, frozen, keys, batch, plan
            )
        else:
            traced = cast(Any, programs.sample_images).trace(stage, variables, frozen, keys, batch, plan)
    parts = {"parameters": variables.params, "statistics": variables.stats, "frozen": frozen, "batch": batch}
    return Program(traced, parts)


# --- batches --------------------------------------------------------------------------------


def stage_columns(stage: Stage) -> tuple[str, ...]:
    """Returns the columns of a stage's batches where the data store all of them."""
    return stage.inputs if stage.degrading else tuple(name for name in stage.inputs if name != "low_res")


def batch_columns(experiment: Experiment, stage: Stage) -> tuple[str, ...]:
    """Returns the columns of the batches of a run: embeddings are stored, or computed by CLIP in the train step."""
    stored = isinstance(experiment.data, EmbeddingsConfig)
    return stage_columns(stage) if stored else select_columns(stage_columns(stage), ())


def column_shapes(
    experiment: Experiment, stage: Stage, clip: ClipStage | None, size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape of each column that a batch of a stage may have.

    Args:
      experiment: of the run.
      stage: what is trained.
      clip: its CLIP, if it requires one.
      size: of the batch.
    """
    side = experiment.resolution or stage.image_size or (clip.model.tower.image_size if clip else 0)
    degrading = stage.degrading
    low = experiment.spec.conditioning.low_size if isinstance(experiment.spec, UpsamplerSpec) else 0
    if degrading:
        side = degrading.crop_side
    length = experiment.spec.text.context_length if experiment.spec.text else 0
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((side, side, 3), jnp.uint8),
        "tokens": ((length,), jnp.int32),
        "mask": ((length,), jnp.bool_),
    }
    if degrading:
        shapes["low_res"] = ((side // degrading.factor, side // degrading.factor, 3), jnp.uint8)
    elif low:
        shapes["low_res"] = ((low, low, 3), jnp.float32)
    if clip is not None:
        states = (clip.model.text.context_length, clip.model.text.width)
        for name in ("image_emb", "text_emb", "null_text_emb"):
            shapes[name] = ((clip.model.embed_dim,), jnp.float32)
        shapes |= {name: (states, jnp.float32) for name in ("text_seq", "null_text_seq")}
        shapes["null_mask"] = shapes["mask"]
    return {name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, (shape, dtype) in shapes.items()}


def _batch(shapes: Mapping[str, jax.ShapeDtypeStruct], columns: tuple[str, ...], mesh: Mesh) -> dict[str, Any]:
    return {name: _rows(shapes[name], mesh) for name in columns}


def _rows(shape: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=batch_sharding(mesh))


def _key(shape: tuple[int, ...], mesh: Mesh) -> jax.ShapeDtypeStruct:
    dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh) if shape else replicated(mesh))


def device_bytes(tree: Any) -> int:
    """Returns the bytes of a tree of shapes with shardings in the memory of one device."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    sharding = cast(jax.sharding.Sharding, leaf.sharding)
    if sharding.memory_kind == HOST:
        return 0
    shape, size = sharding.shard_shape(leaf.shape), 1
    for axis in shape:
        size *= axis
    return size * leaf.dtype.itemsize


def parameter_count(tree: Any) -> int:
    """Returns the number of elements of a tree of shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
