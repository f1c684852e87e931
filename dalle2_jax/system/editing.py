"""What each sampling method does with the stages: generation, and the edits of Ramesh et al. 2022, section 3.

An image is encoded as the pair (z_i, x_T) of its CLIP embedding and of the noise from which DDIM generates it
(section 3, "bipartite latent representation"):

  variations      fresh noise, or x_T under DDIM with eta > 0 (section 3.1)
  reconstruct     x_T under DDIM with eta = 0
  interpolate     slerp(z_a, z_b, theta), theta from 0 to 1 (section 3.2)
  text_diff       slerp(z_i, z_d, theta), z_d = normalised(z_t - z_t0), with x_T of the image (section 3.3)
  inpaint         the decoder is conditioned on a caption, or on the image's own embedding, and known pixels are put
                  back at every step
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32

from dalle2_jax.errors import ConfigError, UserError
from dalle2_jax.system.cascade import Request
from dalle2_jax.system.generation import Call, Generator, collect, warn_of_truncation
from dalle2_jax.system.images import Images
from dalle2_jax.system.inputs import InputImage

_PARALLEL = 1e-6
"""Angle in radians, from 0 or from pi, at which two directions count as parallel."""


def text2image(call: Call, prompts: Sequence[str]) -> Images:
    """Generates images for captions; an empty caption is unconditional."""
    generator, requests = Generator(call), call.requests(prompts)
    warn_of_truncation(call.stages, prompts)
    sampled = generator.text2image(requests, call.options.batch_size, call.options.callback)
    return collect(generator, requests, sampled, [request.prompt for request in requests])


def decode(call: Call, image_emb: Float[np.ndarray, "N E"] | None, prompts: Sequence[str]) -> Images:
    """Generates images for image embeddings, each with its prompt; for prompts alone without embeddings."""
    generator, requests = Generator(call), call.requests(prompts)
    warn_of_truncation(call.stages, prompts)
    return collect(
        generator,
        requests,
        generator.decode(requests, call.options.batch_size, image_emb, callback=call.options.callback),
        [request.prompt for request in requests],
    )


def variations(
    call: Call, inputs: Sequence[InputImage], prompt: str, eta: float | None, whole_inversion: bool
) -> Images:
    """Generates images from the embeddings of given ones, from their own noise unless ``eta`` is None."""
    generator, requests = Generator(with_inversion(call, eta)), call.requests([prompt] * len(inputs))
    warn_of_truncation(call.stages, [prompt])
    pixels = {"clip": generator.clip_input(inputs), "decoder": generator.decoder_input(inputs)}
    inversion = (eta is not None, not whole_inversion)
    sampled = generator.variations(requests, call.options.batch_size, pixels, *inversion, call.options.callback)
    names = [image.name.rpartition("/")[2] for image in inputs]
    return collect(generator, requests, sampled, [request.prompt or names[request.index] for request in requests])


def inpaint(
    call: Call,
    image: InputImage,
    regenerated: Bool[np.ndarray, "H W"],
    prompt: str | None,
    resample: tuple[int, int] | None,
) -> Images:
    """Regenerates a part of an image: from a caption, or without one, from the image's own embedding.

    A decoder without image embeddings is unconditional without a caption.
    """
    generator, requests = Generator(call), call.requests([prompt or ""])
    warn_of_truncation(call.stages, [prompt or ""])
    emb = None
    if prompt is None and "image_emb" in call.stages["decoder"].stage.inputs:
        emb = generator.embed_images(generator.clip_input([image]))
    known = generator.known(image, regenerated)
    sampled = generator.inpaint(requests, call.options.batch_size, known, resample, emb, call.options.callback)
    return collect(generator, requests, sampled, [request.prompt for request in requests])


def interpolate(
    call: Call, inputs: Sequence[InputImage], frames: int, prompt: str, eta: float | None, whole_inversion: bool
) -> Images:
    """Generates ``frames`` images from the first image to the second (section 3.2).

    Without ``eta``, all frames of a sample start from the same fresh noise; with it, from the spherical interpolation
    of the noise of both images.
    """
    generator = Generator(with_inversion(call, eta))
    warn_of_truncation(call.stages, [prompt])
    image_emb = np.asarray(generator.embed_images(generator.clip_input(inputs)))
    theta = np.linspace(0.0, 1.0, frames)
    x_T = None
    if eta is not None:
        pixels, batch_size = generator.decoder_input(inputs), call.options.batch_size
        ends = generator.invert(pixels, image_emb, prompt, batch_size, not whole_inversion)
        x_T = slerp(ends[0], ends[1], theta)
    return _frames(generator, slerp(image_emb[0], image_emb[1], theta), x_T, theta, prompt)


def text_diff(
    call: Call,
    image: InputImage,
    text_emb: Float[np.ndarray, "2 E"],
    theta: Float[np.ndarray, "F"],
    prompt: str,
    whole_inversion: bool,
) -> Images:
    """Generates a frame of an image for each theta, from the direction of one text embedding to another (section 3.3).

    Raises:
      UserError: both texts have the same embedding.
    """
    generator = Generator(with_inversion(call, 0.0))
    warn_of_truncation(call.stages, [prompt])
    image_emb = np.asarray(generator.embed_images(generator.clip_input([image])))
    target = difference_target(image_emb[0], text_emb)
    pixels = generator.decoder_input([image])
    x_T = generator.invert(pixels, image_emb, prompt, call.options.batch_size, not whole_inversion)
    x_T = x_T.repeat(len(theta), axis=0)
    return _frames(generator, slerp(image_emb[0], target, theta), x_T, theta, prompt)


def difference_target(image_emb: Float[np.ndarray, "E"], text_emb: Float[np.ndarray, "2 E"]) -> Float[np.ndarray, "E"]:
    """Returns the normalised difference z_d of two text embeddings, with the norm of an image embedding.

    Raises:
      UserError: both texts have the same embedding.
    """
    difference = text_emb[1] - text_emb[0]
    length = np.linalg.norm(difference)
    if length <= _PARALLEL * np.linalg.norm(text_emb[0]):
        raise UserError("both texts have the same CLIP embedding: there is no difference to apply")
    return difference * (np.linalg.norm(image_emb) / length)


def slerp(
    start: Float[np.ndarray, "..."], end: Float[np.ndarray, "..."], theta: Float[np.ndarray, "F"]
) -> Float32[np.ndarray, "F ..."]:
    """Returns spherical interpolations of two arrays, which are taken as vectors (Shoemake 1985).

    With omega the angle between the unit vectors u and v of both,

        slerp(theta) = (sin((1 - theta) omega) u + sin(theta omega) v) / sin(omega),

    scaled to the norm that is interpolated linearly between both. Parallel vectors are interpolated linearly.

    Raises:
      UserError: the vectors are opposite: every rotation from one to the other is as good.
    """
    a, b = start.astype(np.float64).ravel(), end.astype(np.float64).ravel()
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    u, v = a / lengths[0], b / lengths[1]
    omega = np.arccos(np.clip(u @ v, -1.0, 1.0))
    theta = theta[:, None]
    if omega < _PARALLEL:
        direction = (1.0 - theta) * u[None] + theta * v[None]
    elif omega > np.pi - _PARALLEL:
        raise UserError("the embeddings are opposite: there is no shortest path to interpolate along")
    else:
        direction = (np.sin((1.0 - theta) * omega) * u[None] + np.sin(theta * omega) * v[None]) / np.sin(omega)
    norms = (1.0 - theta) * lengths[0] + theta * lengths[1]
    return (norms * direction).astype(np.float32).reshape(len(theta), *start.shape)


def _frames(
    generator: Generator,
    image_emb: Float32[np.ndarray, "F E"],
    x_T: Float32[np.ndarray, "F H W 3"] | None,
    theta: Float[np.ndarray, "F"],
    prompt: str,
) -> Images:
    """Generates ``num`` images for each frame; sample j of every frame has the same random key."""
    options = generator.call.options
    options.check_count(len(theta))
    requests = [Request(prompt, frame, sample) for sample in range(options.num) for frame in range(len(theta))]
    sampled = generator.decode(
        requests, options.batch_size, image_emb, x_T, callback=options.callback, shared_noise=True
    )
    return collect(generator, requests, sampled, [f"{theta[r.index]:.2f}" for r in requests], columns=len(theta))


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
