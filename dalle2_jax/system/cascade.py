"""Caption -> image embedding -> image -> larger images.

Ramesh et al. 2022, section 2: the diffusion prior samples two image embeddings and takes the one with the larger dot
product with the text embedding, the autoregressive prior samples one (section 2.2); the decoder generates an image from
it, and the upsamplers enlarge it. Section 3 starts from a given image instead: it is represented by (z_i, x_T), its
CLIP embedding and the noise from which DDIM reconstructs it.

Sample j of prompt (or image) i has its own key, fold_in(fold_in(root, i), j), and each stage a stream of it, so that an
image depends only on (seed, i, j, prompt, given images, settings). A `Cascade` is immutable: it may be used from
several threads.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from dalle2_jax import rng
from dalle2_jax.diffusion import Inpainting, resampling, steps_of
from dalle2_jax.errors import UserError
from dalle2_jax.stages import (
    ArSamplingConfig,
    ClipStage,
    DecoderStage,
    DiffusionStage,
    PriorStage,
    SamplingConfig,
    SamplingPlan,
)
from dalle2_jax.system import programs
from dalle2_jax.system.loaded_stage import LoadedStage
from dalle2_jax.system.programs import StepCallback
from dalle2_jax.types import Batch

PRIORS = {"diffusion": "prior", "ar": "ar_prior"}
"""A kind of prior -> the stage that samples image embeddings given captions. A system has one or both; the first is
preferred."""

UPSAMPLERS = ("upsampler_1", "upsampler_2")

Known = Mapping[str, Inpainting]
"""The known pixels of an image, [1, H, W, C] in [-1, 1], at the size of each stage that generates images, by name."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One image to generate: sample ``sample`` of prompt (or given image) number ``index``."""

    prompt: str
    index: int
    sample: int


Images = Iterator[tuple[Request, UInt8[np.ndarray, "H W C"]]]
"""Each request with its image, in order; a batch is generated when its first image is asked for."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample.

    Attributes:
      seed: the random seed.
      sampling: the sampling configuration of each stage, by name.
      candidates: embeddings sampled for each image; None for the prior's own number.
      negative: a caption that guidance moves away from, in place of no caption; "" for none.
    """

    seed: int
    sampling: Mapping[str, SamplingConfig | ArSamplingConfig]
    candidates: int | None = None
    negative: str = ""


class Cascade:
    """The loaded stages from captions to images.

    Args:
      stages: "decoder" and any upsamplers; "clip" and a stage of ``PRIORS``, where the decoder is conditioned on image
        embeddings; loaded on the mesh of ``batch_sharding``.
      settings: how to sample.
      batch_sharding: how a batch is split over the devices.
      devices: number of devices; batches are rounded up to a multiple.
    """

    def __init__(
        self, stages: Mapping[str, LoadedStage], settings: Settings, batch_sharding: jax.sharding.Sharding, devices: int
    ):
        self._stages = stages
        self._settings = settings
        self._sharding = batch_sharding
        self._devices = devices
        self._clip = stages["clip"].variables if "clip" in stages else None
        self._prior = next((name for name in PRIORS.values() if name in stages), None)

    @property
    def _decoder(self) -> DecoderStage:
        return cast(DecoderStage, self._stages["decoder"].stage)

    @property
    def candidates(self) -> int | None:
        """Embeddings sampled for each image; None without a prior."""
        if self._prior is None:
            return None
        return self._settings.candidates or cast(PriorStage, self._stages[self._prior].stage).candidates

    def text2image(self, requests: Sequence[Request], batch_size: int, callback: StepCallback | None = None) -> Images:
        """Yields images of the prompts.

        Args:
          requests: the prompts; an empty one is unconditional.
          batch_size: images at a time.
          callback: called after each step of the decoder and of each upsampler.
        """

        def generate(requests: Sequence[Request], keys: jax.Array) -> jax.Array:
            image = self._decode(keys, requests, self._image_emb(keys, requests), callback)
            return self._upsample(keys, requests, image, callback)

        return self._in_batches(requests, batch_size, generate)

    def inpaint(
        self,
        requests: Sequence[Request],
        batch_size: int,
        known: Known,
        resample: tuple[int, int] | None = None,
        image_emb: Float[np.ndarray, "1 E"] | None = None,
        drop_image: bool = False,
        callback: StepCallback | None = None,
    ) -> Images:
        """Yields images whose known pixels are unchanged.

        Args:
          requests: the prompts.
          batch_size: images at a time.
          known: for the decoder and each upsampler.
          resample: RePaint's (jump, times) for the decoder, see ``diffusion.SamplingOptions``; the upsamplers are
            consistent without, as they are conditioned on the low-resolution image.
          image_emb: the embedding of all images, in place of the prior's.
          drop_image: whether the decoder is conditioned on the prompts only, without an image embedding.
          callback: as in `text2image`.

        Raises:
          UserError: a jump that is as long as the decoder's steps.
        """
        if resample:
            config = cast(SamplingConfig, self._settings.sampling["decoder"])
            resampling(steps_of(self._decoder.schedule, config).num_steps, *resample)

        def generate(requests: Sequence[Request], keys: jax.Array) -> jax.Array:
            if drop_image:
                emb = None
            elif image_emb is None:
                emb = self._image_emb(keys, requests)
            else:
                emb = jnp.broadcast_to(jnp.asarray(image_emb), (len(requests), image_emb.shape[1]))
            options = {"inpainting": known.get("decoder"), "resample": resample}
            return self._upsample(
                keys, requests, self._decode(keys, requests, emb, callback, **options), callback, known
            )

        return self._in_batches(requests, batch_size, generate)

    def decode(
        self,
        requests: Sequence[Request],
        batch_size: int,
        image_emb: Float[np.ndarray, "N E"] | None,
        x_T: Float[np.ndarray, "N H W C"] | None = None,
        shared_noise: bool = False,
        callback: StepCallback | None = None,
    ) -> Images:
        """Yields images generated from image embeddings.

        Args:
          requests: ``index`` is the number of the embedding.
          batch_size: images at a time.
          image_emb: the embeddings, in the space of the embedding contract; None drops them, as training does for some
            examples, so that the decoder is conditioned on the captions only.
          x_T: where to start the decoder, in place of fresh noise, by the same numbers.
          shared_noise: whether requests of the same ``sample`` have the same key, whatever their ``index``.
          callback: as in `text2image`.
        """

        def generate(requests: Sequence[Request], keys: jax.Array) -> jax.Array:
            index = np.asarray([request.index for request in requests], np.int64)
            if shared_noise:
                keys = self._keys([dataclasses.replace(request, index=0) for request in requests])
            emb = None if image_emb is None else self._put(np.asarray(image_emb)[index])[0]
            start = None if x_T is None else self._put(np.asarray(x_T)[index])[0]
            return self._upsample(keys, requests, self._decode(keys, requests, emb, callback, x_T=start), callback)

        return self._in_batches(requests, batch_size, generate)

    def sample_embeddings(self, requests: Sequence[Request], batch_size: int) -> Float[np.ndarray, "N E"]:
        """Returns image embeddings that the prior samples given the prompts, in the space of the contract.

        Raises:
          UserError: there is no prior.
        """
        if self._prior is None:
            raise UserError("this system has no prior: train one, or use a decoder that is conditioned on text only")
        batches = self._batches(requests, batch_size)
        rows = [np.asarray(self._sample_embeddings(self._keys(full), full))[:count] for full, count in batches]
        return np.concatenate(rows)

    def embed_images(self, image: UInt8[np.ndarray, "B S S C"]) -> Float[Array, "B E"]:
        """Returns the CLIP embeddings of images, in the space of the embedding contract."""
        clip = self._stages["clip"]
        sharded = self._put(image)[0] if image.shape[0] % self._devices == 0 else image
        return programs.encode_images(cast(ClipStage, clip.stage), clip.variables, sharded)

    def invert(
        self,
        image: UInt8[np.ndarray, "N S S C"],
        image_emb: Float[np.ndarray, "N E"],
        prompt: str,
        batch_size: int,
        skip_last: bool = True,
    ) -> Float[np.ndarray, "N S S C"]:
        """Returns the noise x_T from which DDIM reconstructs images.

        Args:
          image: the images, of the decoder's size.
          image_emb: their embeddings, in the space of the embedding contract.
          prompt: the caption of all of them.
          batch_size: images at a time.
          skip_last: see ``diffusion.invert``.
        """
        requests = [Request(prompt, number, 0) for number in range(len(image))]
        rows = []
        for full, count in self._batches(requests, batch_size):
            index = np.asarray([request.index for request in full], np.int64)
            (emb,) = self._put(image_emb[index])
            rows.append(np.asarray(self._invert(full, emb, image[index], skip_last))[:count])
        return np.concatenate(rows)

    def _batches(self, requests: Sequence[Request], batch_size: int) -> Iterator[tuple[list[Request], int]]:
        """Yields batches of one size, and how many requests of each count: the last one is padded with repeats.

        All batches have the same size, so that one program serves all of them.
        """
        size = -(-min(batch_size, len(requests)) // self._devices) * self._devices
        for start in range(0, len(requests), size):
            chunk = list(requests[start : start + size])
            yield [chunk[i % len(chunk)] for i in range(size)], len(chunk)

    def _in_batches(
        self,
        requests: Sequence[Request],
        batch_size: int,
        generate: Callable[[Sequence[Request], jax.Array], jax.Array],
    ) -> Images:
        """Yields each request with its image, generated by ``generate(requests, keys)`` in batches."""
        for full, count in self._batches(requests, batch_size):
            batch = np.asarray(programs.to_uint8(generate(full, self._keys(full))))
            yield from zip(full[:count], batch[:count], strict=True)

    def _keys(self, requests: Sequence[Request]) -> Key[Array, "B"]:
        index = np.asarray([request.index for request in requests], np.int32)
        sample = np.asarray([request.sample for request in requests], np.int32)
        return programs.request_keys(rng.root(self._settings.seed), *self._put(index, sample))

    def _image_emb(self, keys: jax.Array, requests: Sequence[Request]) -> Float[Array, "B E"] | None:
        """Returns samples of the prior; None for a decoder that is not conditioned on image embeddings."""
        return self._sample_embeddings(keys, requests) if "image_emb" in self._decoder.inputs else None

    def _sample_embeddings(self, keys: jax.Array, requests: Sequence[Request]) -> Float[Array, "B E"]:
        name = cast(str, self._prior)
        stage = cast(PriorStage, self._stages[name].stage)
        batch, absent = self._captions(name, requests)
        plan = dataclasses.replace(self._plan(name, requests), absent={"text": absent})
        return programs.sample_embeddings(
            stage,
            cast(int, self.candidates),
            self._stages[name].variables,
            self._clip,
            programs.stream_keys(keys, name),
            batch,
            plan,
            self._negative(name, batch, len(requests)),
        )

    def _configs(self, name: str, requests: Sequence[Request]) -> list[SamplingConfig | ArSamplingConfig]:
        """Returns how a stage is sampled for each request."""
        return [self._settings.sampling[name]] * len(requests)

    def _plan(self, name: str, requests: Sequence[Request]) -> Any:
        """Returns the plan of a stage, in which every number is an array with one for each request.

        Equal numbers are an array too, so that the program does not depend on what else is in the batch.
        """
        stage, configs = cast(Any, self._stages[name].stage), self._configs(name, requests)
        plans = {config: stage.plan(config) for config in configs}
        rows = [plans[config] for config in configs]
        stacked = jax.tree.map(lambda *numbers: np.asarray(numbers, np.float32), *rows)
        return jax.device_put(stacked, self._sharding)

    def _image_plan(
        self, name: str, requests: Sequence[Request], absent: Mapping[str, jax.Array], **options: Any
    ) -> SamplingPlan:
        """Returns the plan of a stage that generates images; ``options`` are fields of ``SamplingOptions``."""
        plan: SamplingPlan = self._plan(name, requests)
        return dataclasses.replace(plan, absent=absent, options=dataclasses.replace(plan.options, **options))

    def _sample_images(
        self, name: str, keys: jax.Array, batch: Batch, plan: SamplingPlan, callback: StepCallback | None
    ) -> Float[Array, "B H W C"]:
        loaded = self._stages[name]
        stage, stage_keys = cast(DiffusionStage, loaded.stage), programs.stream_keys(keys, name)
        negative = self._negative(name, batch, keys.shape[0])
        with programs.observed(callback) as observer:
            return programs.sample_images(
                stage, loaded.variables, self._clip, stage_keys, batch, plan, negative, observer
            )

    def _decode(
        self,
        keys: jax.Array,
        requests: Sequence[Request],
        image_emb: jax.Array | None,
        callback: StepCallback | None,
        **options: Any,
    ) -> Float[Array, "B H W C"]:
        """Returns images of the decoder; ``options`` are fields of ``diffusion.SamplingOptions``."""
        batch, absent = self._captions("decoder", requests)
        width, drops = self._decoder.model.image_emb_dim, {"text": absent}
        if image_emb is None and width is not None:
            image_emb = jnp.zeros((len(requests), width))
            drops["image"] = jnp.ones(len(requests), bool)
        if image_emb is not None:
            batch["image_emb"] = image_emb
        plan = self._image_plan("decoder", requests, drops, **options)
        return self._sample_images("decoder", keys, batch, plan, callback)

    def _invert(
        self, requests: Sequence[Request], image_emb: jax.Array, image: np.ndarray, skip_last: bool
    ) -> Float[Array, "B H W C"]:
        batch, absent = self._captions("decoder", requests)
        batch["image_emb"] = image_emb
        steps = cast(SamplingConfig, self._settings.sampling["decoder"]).steps
        params = self._stages["decoder"].variables.params
        (put,) = self._put(image)
        return programs.invert_images(self._decoder, steps, skip_last, params, self._clip, batch, absent, put)

    def _upsample(
        self,
        keys: jax.Array,
        requests: Sequence[Request],
        image: jax.Array,
        callback: StepCallback | None,
        known: Known | None = None,
        names: tuple[str, ...] = UPSAMPLERS,
    ) -> Float[Array, "B H W C"]:
        for name in (name for name in names if name in self._stages):
            batch, drops = Batch(), {}
            if self._stages[name].context_length:
                batch, drops["text"] = self._captions(name, requests)
            batch["low_res"] = image
            plan = self._image_plan(name, requests, drops, inpainting=known[name] if known else None)
            image = self._sample_images(name, keys, batch, plan, callback)
        return image

    def _captions(self, name: str, requests: Sequence[Request]) -> tuple[Batch, jax.Array]:
        """Returns the tokens of a stage, and the prompts that are empty (unconditional).

        Raises:
          UserError: the stage was imported without a tokenizer, and a prompt is not empty.
        """
        loaded = self._stages[name]
        prompts = [request.prompt for request in requests]
        absent = np.asarray([not prompt.strip() for prompt in prompts])
        if loaded.tokenizer is not None:
            tokens, mask = loaded.tokenizer.encode(prompts, loaded.context_length)
        elif absent.all():
            shape = (len(prompts), loaded.context_length)
            tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        else:
            raise UserError(f"stage {name} has no tokenizer: import it again with --tokenizer FOLDER")
        tokens, mask, absent = self._put(tokens, mask, absent)
        return Batch(tokens=tokens, mask=mask), absent

    def _negative(self, name: str, batch: Batch, size: int) -> Batch | None:
        """Returns a batch with the negative caption in place of each caption; None without one, or without captions."""
        if not self._settings.negative or not self._stages[name].context_length:
            return None
        captions, _ = self._captions(name, [Request(self._settings.negative, 0, 0)] * size)
        return cast(Batch, {**batch, **captions})

    def _put(self, *arrays: np.ndarray) -> list[jax.Array]:
        return list(jax.device_put(arrays, self._sharding))
