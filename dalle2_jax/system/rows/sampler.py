"""Sampling by rows: images of several calls in one batch, one stage at a time.

`Cascade` samples the images of one call. Here an image is a `Row`, which has its own random seed, caption, inputs
and settings, and `RowSampler.run` samples one stage for any rows whose `RowSampler.group` is the same, whichever calls
they are from.
What a stage returns is kept in the row, on the host, as the input of the next:

  caption -> prior -> image_emb -> decoder -> image -> upsampler_1 -> image -> upsampler_2 -> image

A row's result depends on the row alone: its keys are those of `Cascade`, fold_in(fold_in(root(seed), index), sample),
and no operation of a stage mixes rows. Batches of another size are other programs, whose floating-point sums may have
another order; see docs/serving.md for what is equal to the last bit.
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Array, Bool, Float32, Key, UInt8

from dalle2_jax.diffusion import Inpainting, steps_of
from dalle2_jax.stages import ArSamplingConfig, SamplingConfig
from dalle2_jax.system import programs
from dalle2_jax.system.cascade import PRIORS, Request
from dalle2_jax.system.editing import inpainting
from dalle2_jax.system.generation import IMAGE_STAGES, Call, Generator
from dalle2_jax.system.inputs import InputImage
from dalle2_jax.system.programs import StepCallback


class KnownPixels(NamedTuple):
    """The known pixels of one image, at the size of one stage."""

    image: Float32[np.ndarray, "H W C"]
    mask: Bool[np.ndarray, "H W 1"]


@dataclasses.dataclass(frozen=True, eq=False)
class Row(Request):
    """One image on its way through the stages.

    ``index`` and ``sample`` decide its random key, as in `Cascade`.

    Attributes:
      seed: the random seed.
      sampling: how each stage is sampled.
      remaining: names of the stages that are still to be sampled, in order.
      image_emb: the image embedding, given or sampled by the prior; None before, or for a decoder without one.
      x_T: where the decoder starts; None for fresh noise.
      known: the known pixels for each stage that generates images; None unless a part of an image is regenerated.
      known_shape: height and width of the image that they are from, which the result is cropped to.
      resample: RePaint's (jump, times) for the decoder.
      image: in [-1, 1], what the last stage returned; None before the decoder.
    """

    seed: int
    sampling: Mapping[str, SamplingConfig | ArSamplingConfig]
    remaining: tuple[str, ...]
    image_emb: Float32[np.ndarray, "E"] | None = None
    x_T: Float32[np.ndarray, "H W C"] | None = None
    known: Mapping[str, KnownPixels] | None = None
    known_shape: tuple[int, int] | None = None
    resample: tuple[int, int] | None = None
    image: Float32[np.ndarray, "H W C"] | None = None

    @property
    def pixels(self) -> UInt8[np.ndarray, "H W C"]:
        """The image of the last stage, rounded as `stages.images.to_uint8` does it."""
        image = np.clip(cast(np.ndarray, self.image), np.float32(-1), np.float32(1))
        pixels = np.round((image + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
        return pixels if self.known_shape is None else pixels[inpainting.extent(self.known_shape, len(pixels))]


class RowSampler(Generator):
    """The cascade of a call, which samples rows of this and of other calls."""

    def __init__(self, call: Call):
        super().__init__(call)
        self.devices = call.mesh.size
        prior = [name for name in PRIORS.values() if name in call.stages]
        self.stage_names: tuple[str, ...] = (*prior, *(name for name in IMAGE_STAGES if name in call.stages))
        """The stages from a caption to the largest image."""

    def group(self, row: Row) -> Hashable:
        """Returns what rows must share to be in one batch: the program of the next stage, and which inputs they have.

        Numbers that do not decide the program, such as scales of guidance, may differ.
        """
        name = row.remaining[0]
        loaded = self.call.stages[name]
        program = jax.tree.structure(cast(Any, loaded.stage).plan(row.sampling[name]))
        if name in PRIORS.values():
            return name, id(loaded), program, self.candidates, self.call.options.negative
        given = [value is None for value in (row.image_emb, row.x_T, row.known)]
        return name, id(loaded), program, *given, row.resample, self.call.options.negative

    def side(self, stage: str) -> int:
        """Returns the side of the images that a stage generates, in pixels."""
        return self._side(stage)

    def steps(self, stage: str) -> int:
        """Returns the steps of a stage that generates images."""
        schedule, config = cast(Any, self.call.stages[stage].stage).schedule, self.sampling[stage]
        return steps_of(schedule, cast(SamplingConfig, config)).num_steps

    def run(self, rows: Sequence[Row], size: int, callback: StepCallback | None = None) -> list[Row]:
        """Samples the next stage of rows that have the same `group`.

        Args:
          rows: the rows.
          size: of the batch, a multiple of the devices and at least the number of rows: it is padded with repeats.
          callback: as in `SampleOptions`; the first images of its batch are those of ``rows``. Not called by the prior.

        Returns:
          The rows with the result of the stage, which is no longer among their ``remaining``.
        """
        stage = rows[0].remaining[0]
        padded = [rows[i % len(rows)] for i in range(size)]
        keys = self._keys(padded)
        if stage in PRIORS.values():
            field, result = "image_emb", self._sample_embeddings(keys, padded)
        elif stage == "decoder":
            options = {"inpainting": self._known(stage, padded), "resample": padded[0].resample}
            x_T = self._stacked([row.x_T for row in padded])
            emb = self._stacked([row.image_emb for row in padded])
            field, result = "image", self._decode(keys, padded, emb, callback, x_T=x_T, **options)
        else:
            known = self._known(stage, padded)
            low_res = cast(jax.Array, self._stacked([row.image for row in padded]))
            every = {stage: known} if known else None
            field, result = "image", self._upsample(keys, padded, low_res, callback, every, (stage,))
        arrays = np.asarray(result)
        return [
            dataclasses.replace(row, remaining=row.remaining[1:], **cast(Any, {field: _finished(row, stage, array)}))
            for row, array in zip(rows, arrays, strict=False)
        ]

    def _configs(self, name: str, requests: Sequence[Request]) -> list[SamplingConfig | ArSamplingConfig]:
        return [row.sampling[name] for row in cast(Sequence[Row], requests)]

    def _keys(self, requests: Sequence[Request]) -> Key[Array, "B"]:
        rows = cast(Sequence[Row], requests)
        seeds = np.asarray([row.seed for row in rows], np.uint32)
        index = np.asarray([row.index for row in rows], np.int32)
        sample = np.asarray([row.sample for row in rows], np.int32)
        return _row_keys(*self._put(seeds, index, sample))

    def _known(self, stage: str, rows: Sequence[Row]) -> Inpainting | None:
        if rows[0].known is None:
            return None
        parts = [cast(Mapping[str, KnownPixels], row.known)[stage] for row in rows]
        image, mask = (np.stack(part) for part in zip(*parts, strict=True))
        return Inpainting(*self._put(image, mask))

    def _stacked(self, arrays: Sequence[np.ndarray | None]) -> jax.Array | None:
        given = [array for array in arrays if array is not None]
        return self._put(np.stack(given))[0] if given else None


def _finished(row: Row, stage: str, result: np.ndarray) -> np.ndarray:
    """Returns what a stage made of a row; with its known pixels if that is the last stage."""
    if row.known is None or row.remaining != (stage,):
        return result
    known = row.known[stage]
    return np.where(known.mask, known.image, result)


@jax.jit
def _row_keys(seed: jax.Array, index: jax.Array, sample: jax.Array) -> Key[Array, "B"]:
    """Returns the key of each row: that of `programs.request_keys` for a root key of its seed."""
    roots = jax.vmap(jax.random.key)(seed)
    return jax.vmap(lambda root, i, j: programs.request_keys(root, i[None], j[None])[0])(roots, index, sample)


def known_pixels(sampler: RowSampler, image: InputImage, regenerated: np.ndarray) -> dict[str, KnownPixels]:
    """Returns the known pixels of an image for each stage, see `Generator.known`."""
    padded = InputImage(inpainting.squared(image.pixels), image.name)
    known = sampler.known(padded, inpainting.squared(regenerated))
    return {name: KnownPixels(np.asarray(part.image)[0], np.asarray(part.mask)[0]) for name, part in known.items()}
