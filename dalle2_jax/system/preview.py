"""Images generated during training, always from the same conditions of split "val"."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax import rng
from dalle2_jax.files import captioned_grid, write_png
from dalle2_jax.stages import DiffusionStage, SamplingPlan, Stage, Variables, images
from dalle2_jax.system import programs
from dalle2_jax.types import Batch

Preview = Callable[[Variables, int], None]
"""Takes the averaged weights and the number of the step."""


def make_preview(
    stage: Stage, frozen: Mapping[str, Variables], batch: Batch, captions: Sequence[str], folder: Path
) -> Preview | None:
    """Returns a function that writes ``folder/<step>.png``; None for a stage that generates no images.

    The decoder generates from the image embeddings of the images in ``batch``, an upsampler from their low-resolution
    versions.

    Args:
      stage: the stage in training.
      frozen: the variables of the stages that it requires.
      batch: examples of the data.
      captions: of the examples, written under the images.
      folder: of the images.
    """
    if stage.image_size is None:
        return None
    sampled = cast(DiffusionStage, stage)
    sampling = sampled.sampling_in_training

    @jax.jit
    def generate(variables: Variables, frozen: Mapping[str, Variables], batch: Batch, plan: SamplingPlan) -> jax.Array:
        keys = rng.per_image(rng.root(0), jnp.arange(len(captions), dtype=jnp.int32))
        prepared = sampled.prepare(frozen, batch)
        return images.to_uint8(programs.sample_images(sampled, variables, None, keys, prepared, plan))

    def preview(variables: Variables, step: int) -> None:
        generated = np.asarray(generate(variables, frozen, batch, sampled.plan(sampling)))
        if jax.process_index() == 0:
            write_png(folder / f"{step:08d}.png", captioned_grid(list(generated), captions))

    return preview
