"""Decodes sequences of embeddings, and given images from their own noise."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Float, Float32, UInt8

from dalle2_jax.diffusion import steps_of
from dalle2_jax.errors import ConfigError
from dalle2_jax.stages import DiffusionStage, SamplingConfig
from dalle2_jax.system.cascade import Request
from dalle2_jax.system.editing.even_paths import even_path
from dalle2_jax.system.editing.geometry import positions, slerp
from dalle2_jax.system.editing.similarity import Distance
from dalle2_jax.system.editing.typography import ranked
from dalle2_jax.system.generation import IMAGE_STAGES, Call, Describe, Generator, Sampled, collect, warn_of_truncation
from dalle2_jax.system.images import Images
from dalle2_jax.system.inputs import InputImage
from dalle2_jax.system.options import check_fraction, sampling_configs

ImageEmb = Float32[np.ndarray, "N E"]

Noise = Float32[np.ndarray, "N H W 3"]


DEPTH = 0.2
"""Share of the noise schedule that text differences invert to by default."""


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


def with_depth(call: Call, depth: float, whole_inversion: bool) -> Call:
    """Returns the call with the decoder's steps in the cleanest part of the noise schedule; unchanged for depth 1.

    Inversion then ends where an image has lost only its details, and sampling starts there, so that what the noise does
    not reach stays as it is.

    Args:
      call: one that is `with_inversion`.
      depth: the share of the timesteps that the decoder's number of steps is spread over, evenly.
      whole_inversion: as in `inverted_noise`.

    Raises:
      ConfigError: the depth is not above 0 and at most 1, or below 1 with a whole inversion, which ends in pure noise.
    """
    check_fraction("depth", depth)
    if not depth:
        raise ConfigError("depth must be above 0", "depth")
    if depth == 1:
        return call
    if whole_inversion:
        raise ConfigError(f"whole_inversion ends in pure noise, and depth is {depth}: set depth to 1", "depth")
    schedule = cast(DiffusionStage, call.stages["decoder"].stage).schedule
    config = cast(SamplingConfig, sampling_configs(call.stages, call.options.settings)["decoder"])
    last, count = max(1, round(depth * schedule.num_steps) - 1), steps_of(schedule, config).num_steps
    timesteps = np.unique(np.linspace(0, last, count).round().astype(int))
    settings = {**call.options.decoder, "steps": "t:" + ",".join(map(str, timesteps))}
    return dataclasses.replace(call, options=dataclasses.replace(call.options, decoder=settings))


def text_diff_prompts(call: Call, after: str, prompt: str | None, theta: Float[np.ndarray, "F"]) -> list[str]:
    """Returns the caption of each frame, see `System.text_diff`.

    By default there are none if a stage that reads captions was imported without its tokenizer.

    Args:
      call: the call.
      after: the caption of what the image becomes.
      prompt: the caption of all frames; None for the default.
      theta: the rotation of each frame.
    """
    if prompt is None:
        image_stages = [call.stages[name] for name in IMAGE_STAGES if name in call.stages]
        readable = all(stage.tokenizer is not None for stage in image_stages if stage.context_length)
        return [after if angle and readable else "" for angle in theta]
    return [prompt] * len(theta)


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
    prompt: str | Sequence[str],
    captions: Sequence[str] | Describe,
    columns: int | None = None,
) -> Images:
    """Generates ``num`` sequences of images, one image for each embedding; the grid has a sequence in each row.

    All images of a sequence have the same random key, and so the same fresh noise. Arguments as in `decode_each`.

    Args:
      prompt: the caption of all images, or one for each embedding.
      columns: of the grid, for several sequences in ``image_emb``; None for one.
    """
    options = generator.call.options
    options.check_count(len(image_emb))
    prompts = [prompt] * len(image_emb) if isinstance(prompt, str) else prompt
    warn_of_truncation(generator.call.stages, [*dict.fromkeys(prompts)])
    requests = [Request(text, frame, sample) for sample in range(options.num) for frame, text in enumerate(prompts)]
    sampled = generator.decode(
        requests, options.batch_size, image_emb, x_T, callback=options.callback, shared_noise=True
    )
    texts = captions if callable(captions) else [captions[request.index] for request in requests]
    return collect(generator, requests, sampled, texts, columns=columns or len(image_emb))


def decode_even_path(
    generator: Generator,
    points: ImageEmb,
    noises: Noise | None,
    prompt: str,
    frames: int,
    distance: Distance,
) -> Images:
    """Generates ``num`` sequences of images on the path through embeddings, see `even_paths.even_path`.

    The provenance has the place of each image on the path, as "place".

    Args:
      generator: of the call.
      points: the embeddings that the path goes through, two or more.
      noises: where the decoder starts at each of them; None is fresh noise, the same for all images of a sequence.
      prompt: the caption of all images.
      frames: images from each point to the next, both included.
      distance: of two images.
    """
    options = generator.call.options
    columns = len(positions(len(points), frames))
    warn_of_truncation(generator.call.stages, [prompt])
    places: dict[Request, float] = {}

    def decode(leg: int, sample: int, theta: Float[np.ndarray, "N"]) -> UInt8[np.ndarray, "N H W 3"]:
        size = min(options.batch_size, frames)
        padded = np.concatenate([theta, np.repeat(theta[-1:], -len(theta) % size)])
        emb = slerp(points[leg], points[leg + 1], padded)
        x_T = None if noises is None else slerp(noises[leg], noises[leg + 1], padded)
        requests = [Request(prompt, number, sample) for number in range(len(padded))]
        decoded = generator.decode(requests, size, emb, x_T, callback=options.callback, shared_noise=True)
        return np.stack([image for _, image in decoded])[: len(theta)]

    def sampled() -> Sampled:
        for sample, leg in itertools.product(range(options.num), range(len(points) - 1)):
            found = even_path(functools.partial(decode, leg, sample), frames, distance)
            for frame in range(1 if leg else 0, frames):
                request = Request(prompt, leg * (frames - 1) + frame, sample)
                places[request] = leg + float(found.places[frame])
                yield request, found.images[frame]

    def describe(request: Request, _: UInt8[np.ndarray, "H W 3"]) -> tuple[str, dict[str, Any]]:
        return f"{places[request]:.2f}", {"place": places[request]}

    requests = [Request(prompt, frame, sample) for sample in range(options.num) for frame in range(columns)]
    return collect(generator, requests, sampled(), describe, columns=columns)


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
