"""Regenerates a part of an image, or extends it: known pixels are put back at every step, and at the end.

An image that is not square is padded by its edge, which counts as known, and cropped again; nothing is squashed.

Outpainting is inpainting in square windows that move outwards from the image, each at least half over known pixels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from dalle2_jax.errors import UsageError
from dalle2_jax.system.cascade import Request
from dalle2_jax.system.generation import Call, Generator, Sampled, collect, warn_of_truncation
from dalle2_jax.system.images import Images
from dalle2_jax.system.inputs import InputImage, fit, square

MAX_MARGIN = 8_192
"""Pixels by which an image is extended on one side."""

MAX_CANVAS = 2**25
"""Pixels of an extended image."""


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


class Margins(NamedTuple):
    """Pixels by which an image is extended, of the size of the result."""

    left: int
    right: int
    top: int
    bottom: int


def inpaint(
    call: Call,
    image: InputImage,
    regenerated: Bool[np.ndarray, "H W"],
    condition: Conditioning,
    resample: tuple[int, int] | None,
) -> Images:
    """Regenerates the part of an image where ``regenerated`` is true; the other pixels of the result are the image's.

    Args:
      call: of the method.
      image: the image.
      regenerated: the part.
      condition: of the new part.
      resample: RePaint's (jump, times), see ``diffusion.resampling``.
    """
    generator, requests = Generator(call), call.requests([condition.prompt])
    warn_of_truncation(call.stages, [condition.prompt])
    options, side = call.options, generator.output_side
    padded, new = squared(image.pixels), squared(regenerated)
    known = generator.known(InputImage(padded, image.name), new)
    sampled = generator.inpaint(requests, options.batch_size, known, resample, *condition[1:], options.callback)
    reference, kept = square(padded, side), np.asarray(known[generator.last_stage].mask)[0]
    place = extent(image.pixels.shape, side)

    def finished() -> Sampled:
        for request, generated in sampled:
            yield request, np.where(kept, reference, generated)[place]

    return collect(generator, requests, finished(), [request.prompt for request in requests])


def outpaint(
    call: Call, image: InputImage, margins: Margins, condition: Conditioning, resample: tuple[int, int] | None
) -> Images:
    """Extends an image, whose shorter side is scaled to the size of generated images.

    Arguments as in `inpaint`.

    Raises:
      UsageError: the result would have more than `MAX_CANVAS` pixels.
    """
    generator, requests = Generator(call), call.requests([condition.prompt])
    warn_of_truncation(call.stages, [condition.prompt])
    pixels = fit(image.pixels, generator.output_side)
    height, width = pixels.shape[0] + margins.top + margins.bottom, pixels.shape[1] + margins.left + margins.right
    if height * width > MAX_CANVAS:
        raise UsageError(
            f"the extended image has {width} x {height} pixels, more than {MAX_CANVAS}: reduce the margins"
        )
    canvas = np.pad(pixels, ((margins.top, margins.bottom), (margins.left, margins.right), (0, 0)), "edge")
    unknown = np.pad(np.zeros(pixels.shape[:2], bool), (margins[2:], margins[:2]), constant_values=True)

    def extended() -> Sampled:
        for request in requests:
            one = condition
            if condition.image_emb is None and not condition.drop_image and generator.candidates is not None:
                one = condition._replace(image_emb=generator.sample_embeddings([request], 1))
            yield request, _extend(generator, canvas.copy(), unknown.copy(), request, (one, resample, margins))

    return collect(generator, requests, extended(), [request.prompt for request in requests])


def _extend(
    generator: Generator,
    canvas: UInt8[np.ndarray, "H W 3"],
    unknown: Bool[np.ndarray, "H W"],
    request: Request,
    how: tuple[Conditioning, tuple[int, int] | None, Margins],
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the canvas with its unknown pixels generated, window by window; each window has its own random key."""
    (condition, resample, margins), side = how, generator.output_side
    for number, (top, left) in enumerate(windows(unknown.shape, margins, side)):
        place = slice(top, top + side), slice(left, left + side)
        new = unknown[place]
        if not new.any():
            continue
        known = generator.known(InputImage(canvas[place], ""), new)
        window = [Request(request.prompt, number, request.sample)]
        sampled = generator.inpaint(window, 1, known, resample, *condition[1:], generator.call.options.callback)
        [(_, generated)] = sampled
        canvas[place] = np.where(new[..., None], generated, canvas[place])
        unknown[place] = False
    return canvas


def windows(shape: tuple[int, ...], margins: Margins, side: int) -> Iterator[tuple[int, int]]:
    """Yields the upper left corners of windows that cover an extended image from the inside out.

    The first windows move sideways along the given image in steps of half a side, and the others then up and down over
    the whole width, so that at least half of each window, or all that is left of it, is known.

    Args:
      shape: height and width of the extended image, each at least ``side``.
      margins: by which the image was extended.
      side: of a window.
    """
    height, width = shape
    inner_rows = _starts(margins.top, height - margins.bottom, side)
    for left in (*_outward(margins.left, side), *_mirrored(_outward(margins.right, side), width, side)):
        yield from ((top, left) for top in inner_rows)
    for top in (*_outward(margins.top, side), *_mirrored(_outward(margins.bottom, side), height, side)):
        yield from ((top, left) for left in _starts(0, width, side))


def _outward(margin: int, side: int) -> list[int]:
    """Returns the starts of windows from a margin's inner edge to 0, in steps of half a side."""
    step = max(1, side // 2)
    return [max(0, start) for start in range(margin - step, -step, -step)] if margin else []


def _mirrored(starts: list[int], length: int, side: int) -> list[int]:
    """Returns starts counted from the other end."""
    return [length - side - start for start in starts]


def _starts(first: int, end: int, side: int) -> list[int]:
    """Returns the starts of windows that cover first to end, in steps of at most half a side."""
    step = max(1, side // 2)
    return [*range(first, end - side, step), end - side]


def squared(array: np.ndarray) -> np.ndarray:
    """Returns an array [H, W, ...] padded to a square on both sides of its shorter axis: pixels by their edge."""
    spare = max(array.shape[:2]) - np.asarray(array.shape[:2])
    widths = [(int(each) // 2, int(each) - int(each) // 2) for each in spare]
    if array.dtype == bool:
        return np.pad(array, widths)
    return np.pad(array, [*widths, (0, 0)], "edge")


def extent(shape: tuple[int, ...], side: int) -> tuple[slice, slice]:
    """Returns where an image of a shape (H, W, ...) lies after `squared`, in a square of ``side`` pixels."""
    longest = max(shape[:2])
    starts = [(longest - length) // 2 for length in shape[:2]]
    first = [round(start * side / longest) for start in starts]
    last = [round((start + length) * side / longest) for start, length in zip(starts, shape[:2], strict=True)]
    rows, columns = (slice(begin, max(begin + 1, end)) for begin, end in zip(first, last, strict=True))
    return rows, columns
