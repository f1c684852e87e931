"""The compiled programs of the cascade, one for each kind of stage.

Their static arguments are a stage and what decides the program; a `SamplingPlan` is a pytree, so that other guidance
scales, another eta or another noise compile nothing. They are pure, and may be called from several threads.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from dalle2_jax import rng
from dalle2_jax.stages import (
    ArPriorStage,
    ArSamplingPlan,
    ClipStage,
    DiffusionStage,
    PriorStage,
    SamplingPlan,
    Variables,
    images,
)
from dalle2_jax.types import Batch, Params

StepCallback = Callable[[int, np.ndarray], None]
"""Called after each step with the number of steps done and the predicted x_0, images uint8[B, H, W, C]."""


@functools.partial(jax.jit, static_argnames=("stage", "candidates"))
def sample_embeddings(
    stage: PriorStage | ArPriorStage,
    candidates: int,
    variables: Variables,
    clip: Variables | None,
    keys: Key[Array, "B"],
    batch: Batch,
    plan: SamplingPlan | ArSamplingPlan,
    negative: Batch | None = None,
) -> Float[Array, "B E"]:
    """Samples image embeddings from the prior, in the space of the embedding contract.

    Of ``candidates`` samples for each caption, the one with the largest dot product with the text embedding is returned
    (Ramesh et al. 2022, section 2.2). ``negative`` has the captions that guidance moves away from.
    """
    batch = stage.prepare_captions(clip, batch)

    def repeat(rows: jax.Array) -> jax.Array:
        """Returns candidate c of example b as row b * candidates + c; a number for all examples as it is."""
        return jnp.repeat(rows, candidates, axis=0) if jnp.ndim(rows) else rows

    plan = dataclasses.replace(plan, negative=negative and stage.condition(stage.prepare_captions(clip, negative)))
    condition, plan = jax.tree.map(repeat, (stage.condition(batch), plan))
    candidate_keys = jax.vmap(lambda key: jax.random.split(key, candidates))(keys).reshape(-1)
    samples = stage.sample(variables, candidate_keys, condition, plan)  # pyright: ignore[reportArgumentType]
    embedding = stage.clip.embedding
    samples = embedding.apply(samples / embedding.scale).reshape(keys.shape[0], candidates, -1)
    closeness = jnp.einsum("bce,be->bc", samples, batch["text_emb"])
    best = closeness.argmax(axis=1)
    return jnp.take_along_axis(samples, best[:, None, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames="stage")
def sample_images(
    stage: DiffusionStage,
    variables: Variables,
    clip: Variables | None,
    keys: Key[Array, "B"],
    batch: Batch,
    plan: SamplingPlan,
    negative: Batch | None = None,
    observer: Int[Array, ""] | None = None,
) -> Float[Array, "B H W C"]:
    """Samples images in [-1, 1] from the decoder or an upsampler.

    Args:
      stage: the decoder or an upsampler.
      variables: its variables.
      clip: CLIP's, for a decoder that reads its text features.
      keys: one an image.
      batch: "image_emb" for a decoder, "low_res" float32[B, h, w, C] in [-1, 1] for an upsampler, and the captions.
      plan: with the known pixels as ``options.inpainting``, [1 or B, H, W, C].
      negative: ``batch`` with the captions that guidance moves away from.
      observer: of `observed`, for a callback after each step.
    """
    inpainting, parts = plan.options.inpainting, {}
    if inpainting is not None and stage.inpainting_network:
        known = {"known": inpainting.image, "known_mask": inpainting.mask}
        parts = {name: jnp.broadcast_to(part, (*keys.shape, *part.shape[1:])) for name, part in known.items()}
    condition = {**stage.condition(stage.prepare_captions(clip, batch)), **parts}
    if negative is not None:
        plan = dataclasses.replace(plan, negative={**stage.condition(stage.prepare_captions(clip, negative)), **parts})
    if observer is not None:
        on_step = functools.partial(jax.debug.callback, _observe, observer)
        plan = dataclasses.replace(plan, options=dataclasses.replace(plan.options, on_step=on_step))
    return jnp.clip(stage.sample(variables, keys, condition, plan), -1.0, 1.0)


@functools.partial(jax.jit, static_argnames=("stage", "steps", "skip_last"))
def invert_images(
    stage: DiffusionStage,
    steps: int | str,
    skip_last: bool,
    params: Params,
    clip: Variables | None,
    batch: Batch,
    absent: jax.Array,
    image: UInt8[Array, "B H W C"],
) -> Float[Array, "B H W C"]:
    """Returns the noise x_T from which DDIM, with the same condition and without guidance, samples these images."""
    condition = stage.condition(stage.prepare_captions(clip, batch))
    return stage.invert(params, images.to_float(image), condition, steps, skip_last, {"text": absent})


@functools.partial(jax.jit, static_argnames="stage")
def encode_images(stage: ClipStage, clip: Variables, image: UInt8[Array, "B S S C"]) -> Float[Array, "B E"]:
    """Returns the CLIP embeddings of square images, in the space of the embedding contract."""
    return stage.encode_image(clip, image)


@jax.jit
def request_keys(key: Key[Array, ""], index: Int[Array, "B"], sample: Int[Array, "B"]) -> Key[Array, "B"]:
    """Returns the key of each request: fold_in(fold_in(key, index), sample)."""
    return jax.vmap(lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j))(index, sample)


@functools.partial(jax.jit, static_argnames="name")
def stream_keys(keys: Key[Array, "B"], name: str) -> Key[Array, "B"]:
    """Returns the key of a stage's stream, by its name, for each request."""
    return jax.vmap(lambda key: rng.stream(key, name))(keys)


@jax.jit
def to_uint8(image: Float[Array, "B H W C"]) -> UInt8[Array, "B H W C"]:
    """Returns images in [-1, 1] as 0..255, see `stages.images.to_uint8`: one program in place of one an operation."""
    return images.to_uint8(image)


class _Observer:
    """A callback, and the first error that it raised."""

    def __init__(self, callback: StepCallback) -> None:
        self.callback, self.error = callback, None

    def __call__(self, step: np.ndarray, x_0: np.ndarray) -> None:
        if self.error is None:
            try:
                self.callback(int(step), np.rint((np.clip(x_0, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8))
            except BaseException as error:  # raised by `observed`, outside the compiled program
                self.error = error


_OBSERVERS: dict[int, _Observer] = {}
_NUMBERS = itertools.count()


def _observe(observer: np.ndarray, step: np.ndarray, x_0: np.ndarray) -> None:
    _OBSERVERS[int(observer)](np.asarray(step), np.asarray(x_0))


@contextlib.contextmanager
def observed(callback: StepCallback | None) -> Iterator[np.ndarray | None]:
    """Registers a callback for `sample_images`; yields its number, an argument of the program, or None without one.

    The number is traced, so that all callbacks share one program. An error of the callback is raised at the end.
    """
    if callback is None:
        yield None
        return
    number, observer = next(_NUMBERS), _Observer(callback)
    _OBSERVERS[number] = observer
    try:
        yield np.asarray(number, np.int32)
        jax.effects_barrier()
    finally:
        jax.effects_barrier()
        del _OBSERVERS[number]
    if observer.error is not None:
        raise observer.error
