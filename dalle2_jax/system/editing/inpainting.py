"""Regenerates a part of an image: known pixels are put back at every step of every stage."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from dalle2_jax.system.generation import Call, Generator, collect, warn_of_truncation
from dalle2_jax.system.images import Images
from dalle2_jax.system.inputs import InputImage


class Conditioning(NamedTuple):
    """What the new part of an image is conditioned on.

    Attributes:
      prompt: a caption; "" for none.
      image_emb: the image embedding; None samples it from the prior, for a decoder that reads one.
      drop_image: whether the decoder gets no image embedding.
    """

    prompt: str
    image_emb: Float32[np.ndarray, "1 E"] | None
    drop_image: bool = False


def inpaint(
    call: Call,
    image: InputImage,
    regenerated: Bool[np.ndarray, "H W"],
    condition: Conditioning,
    resample: tuple[int, int] | None,
) -> Images:
    """Regenerates the part of an image where ``regenerated`` is true.

    Args:
      call: of the method.
      image: the image.
      regenerated: the part.
      condition: of the new part.
      resample: RePaint's (jump, times), see ``diffusion.resampling``.
    """
    generator, requests = Generator(call), call.requests([condition.prompt])
    warn_of_truncation(call.stages, [condition.prompt])
    known, options = generator.known(image, regenerated), call.options
    sampled = generator.inpaint(requests, options.batch_size, known, resample, *condition[1:], options.callback)
    return collect(generator, requests, sampled, [request.prompt for request in requests])
