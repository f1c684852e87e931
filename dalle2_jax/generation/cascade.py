"""Caption -> image embedding -> picture -> larger pictures, one compiled program a stage.

Ramesh et al. 2022, section 2: the diffusion prior draws two image embeddings and keeps the one with
the larger dot product with the text embedding, the autoregressive prior draws one (section 2.2); the
decoder draws a picture from it, and the upsamplers enlarge it. Sample j of prompt i has its own key,
fold_in(fold_in(root, i), j), and each stage a stream of it, so that a picture depends on nothing but
(seed, i, j, prompt, settings).
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt8

from dalle2_jax import rng
from dalle2_jax.generation.system import Member
from dalle2_jax.stages import (
    ArPriorStage,
    ArSamplingConfig,
    DecoderStage,
    PriorStage,
    SamplingConfig,
    UpsamplerStage,
    Variables,
    images,
)
from dalle2_jax.types import Batch, Params

PRIORS = {"diffusion": "prior", "ar": "ar_prior"}
"""A prior's kind -> the stage that turns a caption into an image embedding. A system has one or both; the first is
preferred."""

UPSAMPLERS = ("upsampler_1", "upsampler_2")


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture to draw: sample ``sample`` of prompt number ``index``."""

    prompt: str
    index: int
    sample: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to draw: the seed, the sampling of each stage by name, and embeddings drawn for each picture.

    ``candidates`` None leaves their number to the prior: two by diffusion, one code by code.
    """

    seed: int
    sampling: Mapping[str, SamplingConfig | ArSamplingConfig]
    candidates: int | None = None


@functools.partial(jax.jit, static_argnames=("stage", "config", "candidates"))
def draw_embedding(
    stage: PriorStage | ArPriorStage,
    config: SamplingConfig | ArSamplingConfig,
    candidates: int,
    variables: Variables,
    clip: Variables,
    keys: Key[Array, "B"],
    batch: Batch,
    absent: Bool[Array, "B"],
    scalars: Mapping[str, Any],
) -> Float[Array, "B E"]:
    """Draws image embeddings from the prior, in the contract's space, the best of ``candidates`` each."""
    batch = {**batch, **stage.clip.read(clip, batch)}
    condition = stage.condition(batch)
    # Candidate c of image b is row b * candidates + c.
    repeated = {name: jnp.repeat(value, candidates, axis=0) for name, value in condition.items()}
    candidate_keys = jax.vmap(lambda key: jax.random.split(key, candidates))(keys).reshape(-1)
    drawn = stage.draw(variables, candidate_keys, repeated, config, scalars, jnp.repeat(absent, candidates))
    drawn = stage.clip.embedding.apply(drawn / stage.clip.embedding.scale).reshape(keys.shape[0], candidates, -1)
    closeness = jnp.einsum("bce,be->bc", drawn, batch["text_emb"])
    best = closeness.argmax(axis=1)
    return jnp.take_along_axis(drawn, best[:, None, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames=("stage", "config"))
def draw_picture(
    stage: DecoderStage,
    config: SamplingConfig,
    params: Params,
    clip: Variables,
    keys: Key[Array, "B"],
    batch: Batch,
    absent: Bool[Array, "B"],
    scalars: Mapping[str, Any],
) -> Float[Array, "B H W 3"]:
    """Draws pictures in [-1, 1] from image embeddings and captions."""
    if stage.model.text_input == "clip":
        batch = {**batch, **stage.clip.read(clip, batch)}
    condition = stage.condition(batch)
    picture = stage.sample(params, keys, condition, config, **scalars, absent={"text": absent})
    return jnp.clip(picture, -1.0, 1.0)


@functools.partial(jax.jit, static_argnames=("stage", "config"))
def enlarge(
    stage: UpsamplerStage,
    config: SamplingConfig,
    params: Params,
    keys: Key[Array, "B"],
    picture: Float[Array, "B h w 3"],
    eta: Float[Array, ""],
) -> Float[Array, "B H W 3"]:
    """Enlarges pictures in [-1, 1]."""
    return jnp.clip(stage.sample(params, keys, stage.condition(picture), config, eta=eta), -1.0, 1.0)


@jax.jit
def request_keys(
    key: Key[Array, ""], index: jax.Array, sample: jax.Array
) -> Key[Array, "B"]:
    """Returns the key of each request."""
    return jax.vmap(lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j))(index, sample)


class Cascade:
    """The loaded stages as one machine from captions to pictures.

    Args:
      members: "clip", a stage of ``PRIORS``, "decoder" and any upsamplers, loaded on ``mesh``.
      settings: how to draw.
      batch_sharding: how a batch is split over the devices.
      rows: what a batch's size must divide by.
    """

    def __init__(
        self, members: Mapping[str, Member], settings: Settings, batch_sharding: jax.sharding.Sharding, rows: int
    ):
        self._members = members
        self._settings = settings
        self._sharding = batch_sharding
        self._rows = rows
        self._prior = next(name for name in PRIORS.values() if name in members)

    @property
    def candidates(self) -> int:
        """How many embeddings are drawn for each picture."""
        return self._settings.candidates or self._members[self._prior].stage.candidates

    def text2image(
        self, requests: Sequence[Request], batch_size: int
    ) -> Iterator[tuple[Request, UInt8[np.ndarray, "H W 3"]]]:
        """Yields each request with its picture, in order.

        The last batch is filled up with repeats, which are not yielded, so one program serves all.
        """
        size = -(-min(batch_size, len(requests)) // self._rows) * self._rows
        for start in range(0, len(requests), size):
            chunk = list(requests[start : start + size])
            full = [chunk[i % len(chunk)] for i in range(size)]
            pictures = np.asarray(self._draw(full))
            yield from zip(chunk, pictures[: len(chunk)], strict=True)

    def _draw(self, requests: Sequence[Request]) -> UInt8[Array, "B H W 3"]:
        members, prior = self._members, self._prior
        index, sample = (np.asarray([getattr(r, name) for r in requests], np.int32) for name in ("index", "sample"))
        keys = request_keys(rng.root(self._settings.seed), *self._put(index, sample))
        clip = members["clip"].variables
        batch, absent = self._captions(prior, requests)
        emb = draw_embedding(
            *self._static(prior), self.candidates, members[prior].variables, clip,
            self._stream(keys, prior), batch, absent, self._scalars(prior),
        )
        batch, absent = self._captions("decoder", requests)
        picture = draw_picture(
            *self._static("decoder"), members["decoder"].variables.params, clip,
            self._stream(keys, "decoder"), {**batch, "image_emb": emb}, absent, self._scalars("decoder"),
        )
        for name in UPSAMPLERS:
            if name in members:
                params, eta = members[name].variables.params, self._scalars(name)["eta"]
                picture = enlarge(*self._static(name), params, self._stream(keys, name), picture, eta)
        return images.to_uint8(picture)

    def _captions(self, name: str, requests: Sequence[Request]) -> tuple[Batch, jax.Array]:
        """Returns the tokens of a stage, and which prompts are empty (drawn unconditionally)."""
        member = self._members[name]
        prompts = [request.prompt for request in requests]
        tokens, mask = member.tokenizer.encode(prompts, member.context_length)
        tokens, mask, absent = self._put(tokens, mask, np.asarray([not prompt.strip() for prompt in prompts]))
        return {"tokens": tokens, "mask": mask}, absent

    def _static(self, name: str) -> tuple:
        """A stage and its sampling with the values that are traced instead replaced by fixed ones."""
        return self._members[name].stage, self._settings.sampling[name].split()[0]

    def _scalars(self, name: str) -> dict[str, Any]:
        """The values that are traced."""
        return jax.tree.map(jnp.float32, self._settings.sampling[name].split()[1])

    def _put(self, *arrays: np.ndarray) -> list[jax.Array]:
        return [jax.device_put(array, self._sharding) for array in arrays]

    def _stream(self, keys: jax.Array, name: str) -> jax.Array:
        return jax.vmap(lambda key: rng.stream(key, name))(keys)
