"""Caption -> image embedding -> picture -> larger pictures, one compiled program a stage.

Ramesh et al. 2022, section 2: the diffusion prior draws two image embeddings and keeps the one with
the larger dot product with the text embedding, the autoregressive prior draws one (section 2.2); the
decoder draws a picture from it, and the upsamplers enlarge it. Section 3 begins with a given picture
instead: it is the pair (z_i, x_T) of its CLIP embedding and of the noise from which DDIM draws it.

Sample j of prompt (or picture) i has its own key, fold_in(fold_in(root, i), j), and each stage a stream
of it, so that a picture depends on nothing but (seed, i, j, prompt, what is given, settings).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt8

from dalle2_jax import rng
from dalle2_jax.diffusion import Inpainting, resampling, respace
from dalle2_jax.generation.system import Member
from dalle2_jax.stages import (
    ArPriorStage,
    ArSamplingConfig,
    ClipStage,
    DecoderStage,
    PriorStage,
    SamplingConfig,
    UpsamplerStage,
    Variables,
    images,
)
from dalle2_jax.stages.diffusion import Condition
from dalle2_jax.types import Batch, Params, UserError

PRIORS = {"diffusion": "prior", "ar": "ar_prior"}
"""A prior's kind -> the stage that turns a caption into an image embedding. A system has one or both; the first is
preferred."""

UPSAMPLERS = ("upsampler_1", "upsampler_2")

Known = Mapping[str, Inpainting]
"""What is known of a picture, [1, H, W, C] in [-1, 1], at the size of each stage that draws one."""


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


def picture_side(stage: DecoderStage | UpsamplerStage) -> int:
    """Returns the side of the pictures that a stage draws, in pixels."""
    return (stage.model.unet if isinstance(stage, DecoderStage) else stage.unet).image_size


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
    batch = stage.read(clip, batch)
    condition = stage.condition(batch)
    # Candidate c of image b is row b * candidates + c.
    repeated = {name: jnp.repeat(value, candidates, axis=0) for name, value in condition.items()}
    candidate_keys = jax.vmap(lambda key: jax.random.split(key, candidates))(keys).reshape(-1)
    drawn = stage.draw(variables, candidate_keys, repeated, config, scalars, jnp.repeat(absent, candidates))
    drawn = stage.clip.embedding.apply(drawn / stage.clip.embedding.scale).reshape(keys.shape[0], candidates, -1)
    closeness = jnp.einsum("bce,be->bc", drawn, batch["text_emb"])
    best = closeness.argmax(axis=1)
    return jnp.take_along_axis(drawn, best[:, None, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames=("stage", "config", "resample"))
def draw_picture(
    stage: DecoderStage,
    config: SamplingConfig,
    variables: Variables,
    clip: Variables | None,
    keys: Key[Array, "B"],
    batch: Batch,
    absent: Bool[Array, "B"],
    scalars: Mapping[str, Any],
    x_T: Float[Array, "B H W 3"] | None = None,
    known: Inpainting | None = None,
    resample: tuple[int, int] | None = None,
) -> Float[Array, "B H W 3"]:
    """Draws pictures in [-1, 1] from image embeddings and captions, from given noise or around what is known."""
    condition = _shown(stage, stage.condition(stage.read(clip, batch)), known, len(keys))
    around = {"x_T": x_T, "inpainting": known, "resample": resample}
    return jnp.clip(stage.draw(variables, keys, condition, config, scalars, absent, **around), -1.0, 1.0)


def _shown(
    stage: DecoderStage | UpsamplerStage, condition: Condition, known: Inpainting | None, batch: int
) -> Condition:
    """Returns the condition with what is known of the picture, for a network that was trained to see it."""
    if known is None or not stage.inpaint:
        return condition
    parts = {"known": known.picture, "known_mask": known.mask}
    return {**condition, **{name: jnp.repeat(part, batch, axis=0) for name, part in parts.items()}}


@functools.partial(jax.jit, static_argnames=("stage", "steps", "skip_last"))
def invert_picture(
    stage: DecoderStage,
    steps: int | str,
    skip_last: bool,
    params: Params,
    clip: Variables,
    batch: Batch,
    absent: Bool[Array, "B"],
    picture: UInt8[Array, "B H W 3"],
) -> Float[Array, "B H W 3"]:
    """Returns the noise x_T from which the decoder, told the same, draws these pictures by DDIM without guidance."""
    condition = stage.condition(stage.read(clip, batch))
    return stage.invert(params, images.to_float(picture), condition, steps, skip_last, {"text": absent})


@functools.partial(jax.jit, static_argnames=("stage", "config"))
def enlarge(
    stage: UpsamplerStage,
    config: SamplingConfig,
    variables: Variables,
    keys: Key[Array, "B"],
    picture: Float[Array, "B h w 3"],
    batch: Batch | None,
    absent: Bool[Array, "B"] | None,
    scalars: Mapping[str, Any],
    known: Inpainting | None = None,
) -> Float[Array, "B H W 3"]:
    """Enlarges pictures in [-1, 1], as the captions say if the upsampler reads them, and around what is known."""
    condition = _shown(stage, stage.condition(picture, batch), known, len(keys))
    return jnp.clip(stage.draw(variables, keys, condition, config, scalars, absent, inpainting=known), -1.0, 1.0)


@functools.partial(jax.jit, static_argnames="stage")
def embed_pictures(stage: ClipStage, clip: Variables, picture: UInt8[Array, "B S S 3"]) -> Float[Array, "B E"]:
    """Returns the image embeddings of given pictures, in the contract's space."""
    return stage.encode_image(clip, picture)


@jax.jit
def request_keys(
    key: Key[Array, ""], index: jax.Array, sample: jax.Array
) -> Key[Array, "B"]:
    """Returns the key of each request."""
    return jax.vmap(lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j))(index, sample)


class Cascade:
    """The loaded stages as one machine from captions to pictures.

    Args:
      members: "decoder" and any upsamplers; "clip", if the decoder is told image embeddings, and a stage of ``PRIORS``
        where they come from captions; loaded on the mesh of ``batch_sharding``.
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
        self._clip = members["clip"].variables if "clip" in members else None
        self._prior = next((name for name in PRIORS.values() if name in members), None)

    @property
    def candidates(self) -> int | None:
        """How many embeddings are drawn for each picture; None without a prior."""
        if self._prior is None:
            return None
        return self._settings.candidates or self._members[self._prior].stage.candidates

    def text2image(
        self, requests: Sequence[Request], batch_size: int
    ) -> Iterator[tuple[Request, UInt8[np.ndarray, "H W 3"]]]:
        """Yields each request with its picture, in order."""

        def draw(requests: Sequence[Request]) -> jax.Array:
            keys = self._keys(requests)
            return self._enlarged(keys, requests, self._picture(keys, requests, self._embedding(keys, requests)))

        return self._in_batches(requests, batch_size, draw)

    def inpaint(
        self,
        requests: Sequence[Request],
        batch_size: int,
        known: Known,
        resample: tuple[int, int] | None = None,
        image_emb: Float[Array, "1 E"] | None = None,
    ) -> Iterator[tuple[Request, UInt8[np.ndarray, "H W 3"]]]:
        """Yields pictures drawn around what is known of one, which each of them shows unchanged.

        Args:
          requests: what to draw.
          batch_size: pictures at a time.
          known: for the decoder and each upsampler.
          resample: RePaint's (jump, times) of the decoder, see ``diffusion.sample``; what the upsamplers draw fits
            already, as they are shown the small picture.
          image_emb: what is drawn, in place of the prior's reading of the captions.

        Raises:
          UserError: a jump that the decoder's steps have no room for.
        """
        if resample:
            stage, config = self._static("decoder")
            resampling(respace(stage.schedule, config.steps).num_steps, *resample)

        def draw(requests: Sequence[Request]) -> jax.Array:
            keys = self._keys(requests)
            if image_emb is None:
                emb = self._embedding(keys, requests)
            else:
                emb = jnp.broadcast_to(image_emb, (len(requests), image_emb.shape[1]))
            picture = self._picture(keys, requests, emb, known=known.get("decoder"), resample=resample)
            return self._enlarged(keys, requests, picture, known)

        return self._in_batches(requests, batch_size, draw)

    def redraw(
        self,
        requests: Sequence[Request],
        batch_size: int,
        pictures: Mapping[str, UInt8[np.ndarray, "N S S 3"]],
        inverted: bool,
        skip_last: bool = True,
    ) -> Iterator[tuple[Request, UInt8[np.ndarray, "H W 3"]]]:
        """Yields given pictures drawn anew from their CLIP embeddings.

        Args:
          requests: ``index`` is the picture's number.
          batch_size: pictures at a time.
          pictures: at the size of "clip", and of "decoder" if ``inverted``.
          inverted: whether to start from the noise from which DDIM draws the picture itself (Ramesh et al. 2022,
            section 3.1: what it then changes grows with eta), not from fresh noise.
          skip_last: of the inversion, see ``diffusion.invert``.
        """

        def draw(requests: Sequence[Request]) -> jax.Array:
            keys = self._keys(requests)
            chosen = np.asarray([request.index for request in requests])
            emb = self.embed(pictures["clip"][chosen])
            x_T = self._inverted(requests, emb, pictures["decoder"][chosen], skip_last) if inverted else None
            return self._enlarged(keys, requests, self._picture(keys, requests, emb, x_T=x_T))

        return self._in_batches(requests, batch_size, draw)

    def embed(self, pictures: UInt8[np.ndarray, "B S S 3"]) -> Float[Array, "B E"]:
        """Returns pictures' CLIP embeddings, in the contract's space."""
        clip = self._members["clip"]
        sharded = pictures.shape[0] % self._rows == 0
        return embed_pictures(clip.stage, clip.variables, *(self._put(pictures) if sharded else [pictures]))

    def _in_batches(
        self, requests: Sequence[Request], batch_size: int, draw: Callable[[Sequence[Request]], jax.Array]
    ) -> Iterator[tuple[Request, UInt8[np.ndarray, "H W 3"]]]:
        """Yields what ``draw`` draws, in order.

        The last batch is filled up with repeats, which are not yielded, so one program serves all.
        """
        size = -(-min(batch_size, len(requests)) // self._rows) * self._rows
        for start in range(0, len(requests), size):
            chunk = list(requests[start : start + size])
            full = [chunk[i % len(chunk)] for i in range(size)]
            pictures = np.asarray(images.to_uint8(draw(full)))
            yield from zip(chunk, pictures[: len(chunk)], strict=True)

    def _keys(self, requests: Sequence[Request]) -> Key[Array, "B"]:
        index, sample = (np.asarray([getattr(r, name) for r in requests], np.int32) for name in ("index", "sample"))
        return request_keys(rng.root(self._settings.seed), *self._put(index, sample))

    def _embedding(self, keys: jax.Array, requests: Sequence[Request]) -> Float[Array, "B E"] | None:
        """Returns what the prior makes of the captions; None for a decoder that is told no embedding."""
        members, prior = self._members, self._prior
        if members["decoder"].stage.model.image_emb_dim is None:
            return None
        batch, absent = self._captions(prior, requests)
        return draw_embedding(
            *self._static(prior), self.candidates, members[prior].variables, self._clip,
            self._stream(keys, prior), batch, absent, self._scalars(prior),
        )

    def _picture(
        self, keys: jax.Array, requests: Sequence[Request], image_emb: jax.Array | None, **around: Any
    ) -> Float[Array, "B H W 3"]:
        members, (batch, absent) = self._members, self._captions("decoder", requests)
        batch = batch if image_emb is None else {**batch, "image_emb": image_emb}
        return draw_picture(
            *self._static("decoder"), members["decoder"].variables, self._clip,
            self._stream(keys, "decoder"), batch, absent, self._scalars("decoder"), **around,
        )

    def _inverted(
        self, requests: Sequence[Request], image_emb: jax.Array, pictures: np.ndarray, skip_last: bool
    ) -> Float[Array, "B H W 3"]:
        members, (batch, absent) = self._members, self._captions("decoder", requests)
        stage, config = self._static("decoder")
        return invert_picture(
            stage, config.steps, skip_last, members["decoder"].variables.params, self._clip,
            {**batch, "image_emb": image_emb}, absent, *self._put(pictures),
        )

    def _enlarged(
        self, keys: jax.Array, requests: Sequence[Request], picture: jax.Array, known: Known | None = None
    ) -> Float[Array, "B H W 3"]:
        for name in (name for name in UPSAMPLERS if name in self._members):
            batch, absent = self._captions(name, requests) if self._members[name].context_length else (None, None)
            picture = enlarge(
                *self._static(name), self._members[name].variables, self._stream(keys, name),
                picture, batch, absent, self._scalars(name), known and known[name],
            )
        return picture

    def _captions(self, name: str, requests: Sequence[Request]) -> tuple[Batch, jax.Array]:
        """Returns the tokens of a stage, and which prompts are empty (drawn unconditionally)."""
        member = self._members[name]
        prompts = [request.prompt for request in requests]
        absent = np.asarray([not prompt.strip() for prompt in prompts])
        if member.tokenizer is not None:
            tokens, mask = member.tokenizer.encode(prompts, member.context_length)
        elif absent.all():
            shape = (len(prompts), member.context_length)
            tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        else:
            raise UserError(f"stage {name} came without a tokenizer: import it again with --tokenizer FOLDER")
        tokens, mask, absent = self._put(tokens, mask, absent)
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
