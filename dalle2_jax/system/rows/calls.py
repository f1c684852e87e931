"""The rows of each call: what `System`'s methods of the same names generate, as rows for `RowSampler`.

Given images are embedded and inverted here, one image at a time, so that a row does not depend on how many images its
call was given. The equations are those of `dalle2_jax.system.editing`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dalle2_jax.diffusion import resampling
from dalle2_jax.errors import ConfigError, UsageError, UserError
from dalle2_jax.ranges import Range
from dalle2_jax.system.cascade import PRIORS
from dalle2_jax.system.editing.embedding_edits import MAX_FRAMES
from dalle2_jax.system.editing.frames import DEPTH, text_diff_prompts, with_depth, with_inversion
from dalle2_jax.system.editing.geometry import slerp, text_direction
from dalle2_jax.system.generation import NO_IMAGE_EMB, clip_input, provenance
from dalle2_jax.system.inputs import ImageLike, InputImage, read_captions, read_image, read_mask
from dalle2_jax.system.options import SampleOptions, check_fraction, check_number
from dalle2_jax.system.rows.sampler import Row, RowSampler, known_pixels
from dalle2_jax.system.system import System


class RowCall(NamedTuple):
    """A call, ready to be sampled.

    Attributes:
      sampler: of the call.
      rows: one an image.
      provenance: as `Images.provenance`, with the rows as its images.
    """

    sampler: RowSampler
    rows: list[Row]
    provenance: dict[str, Any]


def text2image(system: System, options: SampleOptions, *, prompt: str) -> RowCall:
    """Returns the rows of ``num`` images of a caption."""
    call = system.call("text2image", options, system.embeds_images)
    return _rows(RowSampler(call), [{"prompt": _caption(prompt)}])


def variations(
    system: System, options: SampleOptions, *, image: ImageLike, prompt: str = "", eta: float | None = None
) -> RowCall:
    """Returns the rows of ``num`` variations of an image, see `System.variations`."""
    if eta is not None:
        check_fraction("eta", eta)
    given = read_image(image)
    call = system.call("variations", options, inputs={"image": [given.name], "eta": eta})
    sampler = RowSampler(with_inversion(call, eta))
    emb = _embedding(sampler, given)
    x_T = None if eta is None else _inverted(sampler, given, emb, _caption(prompt))
    return _rows(sampler, [{"prompt": _caption(prompt), "image_emb": emb, "x_T": x_T}])


def reconstruct(
    system: System, options: SampleOptions, *, image: ImageLike, prompt: str = "", steps: int | str | None = None
) -> RowCall:
    """Returns the rows of ``num`` (1) reconstructions of an image, see `System.reconstruct`."""
    decoder = {**options.get("decoder", {}), **({} if steps is None else {"steps": steps})}
    inverted: SampleOptions = {"num": 1, **options, "decoder": decoder}
    made = variations(system, inverted, image=image, prompt=prompt, eta=0.0)
    return made._replace(provenance={**made.provenance, "command": "reconstruct"})


def inpaint(
    system: System,
    options: SampleOptions,
    *,
    image: ImageLike,
    mask: ImageLike,
    prompt: str | None = None,
    resample: tuple[int, int] | None = None,
) -> RowCall:
    """Returns the rows of ``num`` images of which a part is regenerated, see `System.inpaint`."""
    given = read_image(image)
    regenerated = read_mask(mask, given)
    inputs = {"image": given.name, "mask": "given in memory", "resample": resample and list(resample)}
    call = system.call("inpaint", options, prompt is not None and system.embeds_images, inputs)
    sampler = RowSampler(call)
    if resample:
        resampling(sampler.steps("decoder"), *resample)
    emb = _embedding(sampler, given) if prompt is None and system.embeds_images else None
    known = known_pixels(sampler, given, regenerated)
    shape = given.pixels.shape[:2]
    fields = {"prompt": _caption(prompt or ""), "image_emb": emb, "known": known, "known_shape": shape}
    fields["resample"] = resample
    return _rows(sampler, [fields])


def interpolate(
    system: System,
    options: SampleOptions,
    *,
    images: list[ImageLike],
    frames: int = 8,
    eta: float | None = None,
    prompt: str = "",
) -> RowCall:
    """Returns the rows of the images between two, see `System.interpolate`."""
    check_number("frames", frames, Range(2, MAX_FRAMES))
    if eta is not None:
        check_fraction("eta", eta)
    if len(images) != 2:
        raise UsageError(f"interpolate takes two images, got {len(images)}")
    given = [read_image(image) for image in images]
    inputs = {"image": [image.name for image in given], "frames": frames, "eta": eta}
    sampler = RowSampler(with_inversion(system.call("interpolate", options, inputs=inputs, num=1), eta))
    theta = np.linspace(0.0, 1.0, frames)
    ends = [_embedding(sampler, image) for image in given]
    x_T: Any = [None] * frames
    if eta is not None:
        noise = [_inverted(sampler, *pair, prompt) for pair in zip(given, ends, strict=True)]
        x_T = slerp(noise[0], noise[1], theta)
    emb = slerp(ends[0], ends[1], theta)
    return _rows(sampler, [_frame(prompt, emb[i], x_T[i]) for i in range(frames)], shared_noise=True)


def text_diff(
    system: System,
    options: SampleOptions,
    *,
    image: ImageLike,
    captions: tuple[str, str],
    frames: int = 8,
    theta: float = 0.5,
    depth: float = DEPTH,
    prompt: str | None = None,
) -> RowCall:
    """Returns the rows of an image changed by the difference between two captions, see `System.text_diff`.

    ``captions`` are what the image shows, and what it becomes.
    """
    check_number("frames", frames, Range(2, MAX_FRAMES))
    check_fraction("theta", theta)
    given, (before, after) = read_image(image), captions
    inputs = {"image": given.name, "from": _caption(before), "to": _caption(after), "frames": frames, "theta": theta}
    inputs["depth"] = depth
    call = with_inversion(system.call("text_diff", options, inputs=inputs, num=1), 0.0)
    sampler = RowSampler(with_depth(call, depth, whole_inversion=False))
    emb = _embedding(sampler, given)
    text_emb = system.embed_text([before, after])
    target = text_direction(text_emb[1], text_emb[:1], float(np.linalg.norm(emb)))
    angles = np.linspace(0.0, theta, frames)
    prompts = text_diff_prompts(call, after, prompt, angles)
    x_T, rotated = _inverted(sampler, given, emb, prompt or ""), slerp(emb, target, angles)
    return _rows(sampler, [_frame(prompts[i], rotated[i], x_T) for i in range(frames)], shared_noise=True)


COMMANDS: Mapping[str, Callable[..., RowCall]] = {
    "text2image": text2image,
    "variations": variations,
    "reconstruct": reconstruct,
    "inpaint": inpaint,
    "interpolate": interpolate,
    "text_diff": text_diff,
}
"""Command -> the function that makes its rows."""


def until(made: RowCall, side: int | None) -> RowCall:
    """Returns a call that ends with the stage whose images have ``side`` pixels each way; None is the largest.

    Raises:
      ConfigError: no stage generates images of that size.
    """
    names = [name for name in made.sampler.stage_names if name not in PRIORS.values()]
    sides = {made.sampler.side(name): name for name in names}
    if side is None:
        return made
    if side not in sides:
        listed = ", ".join(f"{size}x{size}" for size in sides)
        raise ConfigError(f"this system generates no images of size {side}x{side}: choose from {listed}", "size")
    last = names.index(sides[side])
    kept = {*PRIORS.values(), *names[: last + 1]}
    rows = [dataclasses.replace(row, remaining=tuple(n for n in row.remaining if n in kept)) for row in made.rows]
    return made._replace(rows=rows)


def _rows(sampler: RowSampler, fields: list[dict[str, Any]], shared_noise: bool = False) -> RowCall:
    """Returns ``num`` rows for each of ``fields``; with ``shared_noise``, sample by sample with one key for each."""
    options = sampler.call.options
    options.check_count(len(fields))
    numbers = [(i, j) for i in range(len(fields)) for j in range(options.num)]
    if shared_noise:
        numbers.sort(key=lambda pair: pair[1])
    rows = []
    for i, j in numbers:
        given = fields[i].get("image_emb") is not None
        stages = tuple(name for name in sampler.stage_names if not given or name not in PRIORS.values())
        row: Any = {"index": 0 if shared_noise else i, "sample": j, "seed": options.seed, "remaining": stages}
        row["sampling"] = sampler.sampling
        rows.append(Row(**row, **fields[i]))
    named = [dataclasses.replace(row, index=i) for row, (i, _) in zip(rows, numbers, strict=True)]
    return RowCall(sampler, rows, provenance(sampler, named))


def _frame(prompt: str, image_emb: np.ndarray, x_T: np.ndarray | None) -> dict[str, Any]:
    return {"prompt": _caption(prompt), "image_emb": image_emb, "x_T": x_T}


def _embedding(sampler: RowSampler, image: InputImage) -> np.ndarray:
    """Returns the CLIP embedding of an image, [E]. UserError for a decoder that reads none."""
    if "image_emb" not in sampler.call.stages["decoder"].stage.inputs:
        raise UserError(NO_IMAGE_EMB)
    return np.asarray(sampler.embed_images(clip_input(sampler.call.stages["clip"], [image])))[0]


def _inverted(sampler: RowSampler, image: InputImage, image_emb: np.ndarray, prompt: str) -> np.ndarray:
    """Returns the noise from which DDIM reconstructs an image, [H, W, C]."""
    return sampler.invert(sampler.decoder_input([image]), image_emb[None], prompt, 1)[0]


def _caption(text: str) -> str:
    return read_captions(text)[0]
