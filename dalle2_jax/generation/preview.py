"""Pictures drawn while a stage trains: the same held-out conditions at every visit."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from dalle2_jax import rng
from dalle2_jax.files import captioned_grid, write_png
from dalle2_jax.stages import DecoderStage, Stage, UpsamplerStage, Variables, images
from dalle2_jax.types import Batch

Preview = Callable[[Variables, int], None]


def make_preview(
    stage: Stage, frozen: Mapping[str, Variables], batch: Batch, captions: Sequence[str], folder: Path
) -> Preview | None:
    """Returns what draws ``folder/<step>.png`` from averaged weights, or None for a stage without pictures.

    The decoder draws from the image embeddings of the held-out pictures in ``batch``, the
    upsamplers from their small versions.
    """
    if not isinstance(stage, DecoderStage | UpsamplerStage):
        return None

    sampling = stage.sampling
    if sampling.variance == "analytic":  # its moments are measured once training has ended
        sampling = dataclasses.replace(sampling, variance="auto")

    @functools.partial(jax.jit, static_argnames="config")
    def draw(variables, frozen, batch, config):
        key = rng.root(0)
        batch = stage.prepare(frozen, batch)
        if isinstance(stage, UpsamplerStage):
            low_res = images.resize(images.to_float(batch["image"]), stage.low_size)
            condition = stage.condition(low_res, batch if stage.is_told else None)
        else:
            condition = stage.condition(batch)
        keys = rng.per_image(key, np.arange(len(captions), dtype=np.int32))
        return images.to_uint8(stage.draw(variables, keys, condition, config, {}))

    def preview(variables: Variables, step: int) -> None:
        pictures = np.asarray(draw(variables, frozen, batch, sampling))
        if jax.process_index() == 0:
            write_png(folder / f"{step:08d}.png", captioned_grid(list(pictures), captions))

    return preview
