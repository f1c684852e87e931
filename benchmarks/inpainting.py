"""Networks trained to inpaint against masked sampling, on a system of shapes: JSON lines and a table.

    python train.py --config configs/shapes.py:decoder,inpaint --workdir runs/inpaint --config.init_from=shapes
    python benchmarks/inpainting.py --system shapes --trained runs/inpaint

A box with sides of a quarter to three quarters of the image is erased from rendered scenes of split ``val`` and
generated again, conditioned on the scene's caption, by

  masked sampling           the system's own decoder, with the known pixels put in after each step
  masked, guidance 2        the same, with classifier-free guidance
  masked, with resampling   the first, with every 5 steps taken 4 times (RePaint, Lugmayr et al. 2022)
  trained                   the decoder of ``--trained``, which has the known pixels and their mask as input (GLIDE)

Errors are those of the pixels inside the box, in levels of 255, and with ``--lpips`` LPIPS of the whole image. The
baseline has the box of the next image in its place.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

import measured
import numpy as np
import tqdm
from jaxtyping import Bool
from measured import HeldOut, Pixels, in_chunks

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.errors import UsageError
from dalle2_jax.evaluation.figures import Figure, Figures, mean_of, share_of
from dalle2_jax.system.editing.similarity import Distance
from dalle2_jax.system.system import System, load

Masks = Bool[np.ndarray, "N H W"]

SIDES = 0.25, 0.75
"""Smallest and largest side of an erased box, over that of the image."""

RESAMPLE = 5, 4
"""RePaint's (jump, times)."""


class Method(NamedTuple):
    """A way to inpaint: its title, the system, RePaint's (jump, times), and settings of the decoder."""

    title: str
    system: System
    resample: tuple[int, int] | None = None
    decoder: Mapping[str, Any] = {}


def boxes(count: int, side: int, seed: int) -> Masks:
    """Samples a box for each image; true inside."""
    random, masks = np.random.default_rng(seed), np.zeros((count, side, side), bool)
    for mask in masks:
        lengths = [int(random.integers(round(SIDES[0] * side), round(SIDES[1] * side) + 1)) for _ in range(2)]
        top, left = (int(random.integers(0, side - length + 1)) for length in lengths)
        mask[top : top + lengths[0], left : left + lengths[1]] = True
    return masks


def inpainted(method: Method, data: HeldOut, masks: Masks, seed: int) -> Pixels:
    """Returns the images with their boxes generated again."""
    results = []
    rows = list(zip(data.images, masks, data.captions, strict=True))
    for image, mask, caption in tqdm.tqdm(rows, desc=method.title, unit="image"):
        how = {"resample": method.resample, "decoder": method.decoder}
        found = method.system.inpaint(image, mask, caption, num=1, seed=seed, **how)
        results.append(found.numpy[0])
    return np.stack(results)


def error_inside(images: Pixels, given: Pixels, masks: Masks) -> np.ndarray:
    """Returns the root mean squared error of each image inside its box, in levels of 255."""
    squared = np.square(images.astype(np.float64) - given).mean(axis=3)
    return np.sqrt(np.where(masks, squared, 0.0).sum(axis=(1, 2)) / masks.sum(axis=(1, 2)))


def unchanged_outside(images: Pixels, given: Pixels, masks: Masks) -> Figure:
    """Returns the share of images whose pixels outside the box are those of the given image, bit for bit."""
    same = (images == given).all(axis=3)
    return share_of((same | masks).all(axis=(1, 2)))


def measure(data: HeldOut, masks: Masks, images: Pixels, distance: Distance | None) -> tuple[Figures, np.ndarray]:
    """Returns the figures of a method, and its error for each image, by which methods are compared: LPIPS if given."""
    others = np.where(masks[..., None], np.roll(data.images, -1, axis=0), data.images)
    inside, baseline = (error_inside(each, data.images, masks) for each in (images, others))
    figures = {
        "RMS error inside": mean_of(inside).compared(mean_of(baseline), "the next image's box"),
        "scene as given": measured.kept(
            measured.read_all(images), data.scenes, "colour", "shape", "size", "background"
        ),
        "unchanged outside": unchanged_outside(images, data.images, masks),
    }
    compared = inside
    if distance is not None:
        compared, baseline = (in_chunks(distance, each, data.images) for each in (images, others))
        figures["LPIPS"] = mean_of(compared).compared(mean_of(baseline), "the next image's box")
    return figures, compared


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    example = "python benchmarks/inpainting.py --system shapes --trained runs/inpaint"
    parser = measured.make_parser("inpainting", "Compares ways to inpaint.", example)
    parser.add_argument("--trained", type=args.system, help="a system whose decoder was trained to inpaint")
    parser.add_argument("--num", type=args.positive_int, default=128, help="images (default %(default)s)")
    parser.add_argument("--lpips", type=args.path, metavar="DIR", help="folder of an imported LPIPS")
    return parser


def methods(options: argparse.Namespace) -> list[Method]:
    """Returns the ways to inpaint that are compared.

    Raises:
      UsageError: the decoder of ``--system`` was trained to inpaint, or that of ``--trained`` was not.
    """
    system = load(options.system)
    found = [
        Method("masked sampling", system),
        Method("masked, guidance 2", system, decoder={"guidance": 2.0}),
        Method("masked, with resampling", system, RESAMPLE),
    ]
    found += [Method("trained", load(options.trained))] if options.trained else []
    for method in found:
        stage = method.system.stages["decoder"].stage
        if stage.inpainting_network != (method.title == "trained"):
            known = "was trained to inpaint" if stage.inpainting_network else "was not trained to inpaint"
            raise UsageError(f"the decoder of {method.system.path} {known}: give another system for {method.title}")
    return found


def main() -> None:
    """Runs the command line."""
    options = make_parser().parse_args()
    distance = None if options.lpips is None else measured.make_distance(options.lpips)[1]
    compared = methods(options)
    data = measured.held_out(compared[0].system, options.num)
    masks = boxes(options.num, data.images.shape[1], options.seed)
    table: Figures = {}
    errors: dict[str, np.ndarray] = {}
    for method in compared:
        images = inpainted(method, data, masks, options.seed)
        figures, error = measure(data, masks, images, distance)
        if method.title == "trained":
            figures |= {f"error less that of {title}": mean_of(error - other) for title, other in errors.items()}
        errors[method.title] = error
        about = {"method": method.title, "system": measured.shown_system(method.system.path)}
        measured.emit("inpainting", figures, **about)
        table |= {f"{method.title}: {name}": figure for name, figure in figures.items()}
    measured.publish("inpainting", measured.table(table), options.page)


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
