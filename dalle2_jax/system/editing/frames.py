"""Decodes sequences of embeddings, and given images from their own noise."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8

from dalle2_jax.errors import ConfigError
from dalle2_jax.system.cascade import Request
from dalle2_jax.system.editing.typography import ranked
from dalle2_jax.system.generation import Call, Describe, Generator, Sampled, collect, warn_of_truncation
from dalle2_jax.system.images import Images
from dalle2_jax.system.inputs import InputImage

ImageEmb = Float32[np.ndarray, "N E"]

Noise = Float32[np.ndarray, "N H W 3"]


def with_inversion(call: Call, eta: float | None) -> Call:
    """Returns the call with the decoder's settings that DDIM inversion implies; unchanged if ``eta`` is None.

    The noise is that of DDIM without guidance, so that the decoder is sampled by DDIM, and without guidance unless the
    settings ask for it.

    Raises:
      ConfigError: the settings ask for another sampler, or another eta.
    """
    if eta is None:
        return call
    implied = {"name": "ddim", "eta": eta}
    for field, value in implied.items():
        if call.options.decoder.get(field, value) != value:
            raise ConfigError(f"decoder.{field} is {value} here: leave it out", f"decoder.{field}")
    settings = {"guidance": 1.0, **call.options.decoder, **implied}
    return dataclasses.replace(call, options=dataclasses.replace(call.options, decoder=settings))


def inverted_noise(
    generator: Generator, inputs: Sequence[InputImage], image_emb: ImageEmb, prompt: str, whole_inversion: bool
) -> Noise:
    """Returns the noise x_T from which DDIM reconstructs images under their embeddings.

    Args:
      generator: of a call that is `with_inversion`.
      inputs: the images.
      image_emb: an embedding for each.
      prompt: the caption of all of them.
      whole_inversion: whether the last step, to pure noise, is inverted too.
    """
    pixels = generator.decoder_input(inputs)
    return generator.invert(pixels, image_emb, prompt, generator.call.options.batch_size, not whole_inversion)


def decode_each(
    generator: Generator, image_emb: ImageEmb, x_T: Noise | None, prompt: str, captions: Sequence[str] | Describe
) -> Images:
    """Generates ``num`` images for each embedding, and from its noise if that is given.

    Args:
      generator: of the call.
      image_emb: the embeddings.
      x_T: where the decoder starts; None is fresh noise.
      prompt: the caption of all images.
      captions: what the grid shows for each embedding, or a function as in `collect`.
    """
    options = generator.call.options
    requests = generator.call.requests([prompt] * len(image_emb))
    warn_of_truncation(generator.call.stages, [prompt])
    sampled = generator.decode(requests, options.batch_size, image_emb, x_T, callback=options.callback)
    texts = captions if callable(captions) else [captions[request.index] for request in requests]
    return collect(generator, requests, sampled, texts)


def decode_path(
    generator: Generator,
    image_emb: ImageEmb,
    x_T: Noise | None,
    prompt: str,
    captions: Sequence[str] | Describe,
    columns: int | None = None,
) -> Images:
    """Generates ``num`` sequences of images, one image for each embedding; the grid has a sequence in each row.

    All images of a sequence have the same random key, and so the same fresh noise. Arguments as in `decode_each`.

    Args:
      columns: of the grid, for several sequences in ``image_emb``; None for one.
    """
    options = generator.call.options
    options.check_count(len(image_emb))
    warn_of_truncation(generator.call.stages, [prompt])
    requests = [Request(prompt, frame, sample) for sample in range(options.num) for frame in range(len(image_emb))]
    sampled = generator.decode(
        requests, options.batch_size, image_emb, x_T, callback=options.callback, shared_noise=True
    )
    texts = captions if callable(captions) else [captions[request.index] for request in requests]
    return collect(generator, requests, sampled, texts, columns=columns or len(image_emb))


def decode_with_inputs(
    generator: Generator,
    image_emb: ImageEmb,
    given: UInt8[np.ndarray, "N H W 3"],
    prompt: str,
    classified: tuple[Sequence[str], Float[np.ndarray, "N K"]],
) -> Images:
    """Generates ``num`` images for each embedding, in rows that begin with a given image.

    Sample 0 of each index is the given image; sample j > 0 of every index has the same fresh noise.

    Args:
      generator: of the call.
      image_emb: the embeddings.
      given: an image for each, of the size of generated ones.
      prompt: the caption of all images.
      classified: labels, and their probabilities for each given image.
    """
    options, (labels, shares) = generator.call.options, classified
    options.check_count(len(image_emb))
    warn_of_truncation(generator.call.stages, [prompt])
    rows = [[Request(prompt, index, sample) for sample in range(options.num + 1)] for index in range(len(image_emb))]
    generated = [request for row in rows for request in row[1:]]

    def sampled() -> Sampled:
        decoded = generator.decode(
            generated, options.batch_size, image_emb, callback=options.callback, shared_noise=True
        )
        for index, row in enumerate(rows):
            yield row[0], given[index]
            yield from itertools.islice(decoded, options.num)

    def describe(request: Request, _: UInt8[np.ndarray, "H W 3"]) -> tuple[str, dict[str, Any]]:
        if request.sample:
            return f"variation {request.sample}", {}
        found = shares[request.index]
        about = {label: float(share) for label, share in zip(labels, found, strict=True)}
        return ranked(labels, found), {"probabilities": about}

    requests = [request for row in rows for request in row]
    return collect(generator, requests, sampled(), describe, columns=options.num + 1)
