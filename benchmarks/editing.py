"""How well the editing methods of the paper keep what they should, on a system of shapes: JSON lines and a table.

    python benchmarks/editing.py --system shapes

Images are rendered scenes of split ``val``, and attributes are read by `dalle2_jax.data.synthetic.scene_reader`.

  reconstruction   PSNR from the noise of DDIM inversion, and from fresh noise (Ramesh et al. 2022, section 3)
  variations       what two variations of an image keep of it, and how far they are from each other (section 3.1);
                   with the decoder's own guidance, and with a scale of 2
  interpolation    PSNR at the end points with inverted noises, and the evenness of the path (section 3.2), for frames
                   at equal rotations and for even ones
  text_diff        colour changed by the difference of two captions, and the rest kept (section 3.3)

Evenness is the largest distance between neighbouring frames over the mean of these distances: 1 for equal steps. The
distance is LPIPS with ``--lpips``, else the root mean squared difference of pixels.
"""

import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import argparse
import dataclasses

import measured
import numpy as np
import tqdm
from measured import HeldOut, in_chunks, kept
from PIL import Image

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.data.synthetic import grammar
from dalle2_jax.data.synthetic.scenes import Scene
from dalle2_jax.data.synthetic.shapes import COLOURS
from dalle2_jax.errors import UsageError
from dalle2_jax.evaluation.figures import Figure, Figures, mean_of, share_of
from dalle2_jax.system.editing.similarity import Distance, psnr
from dalle2_jax.system.system import System, load

FRAMES = 8
"""Images of a path of interpolation."""

PLACE = 0.03
"""Distance of an object's centroid, in sides of the image, below which its place is kept: 1 pixel of 32."""

ALL = "all of these"
"""Title of the share of images of which all that a text difference should change or keep is right."""

EVEN = 1.5
"""Largest evenness of a path that counts as smooth."""


def reconstruction(system: System, data: HeldOut, options: argparse.Namespace) -> Figures:
    """Returns the PSNR of reconstructions, of images from fresh noise, and their difference."""
    images, steps = pillow(data), options.steps
    shared = {"num": 1, "seed": options.seed, "progress": True}
    again = system.reconstruct(images, steps=steps, **shared).numpy
    fresh = system.variations(images, decoder={"name": "ddim", "steps": steps, "guidance": 1.0}, **shared).numpy
    ours, theirs = (psnr_of(each, data.images) for each in (again, fresh))
    return {
        f"PSNR, inverted noise, {steps} steps, dB": mean_of(ours).compared(mean_of(theirs), "fresh noise"),
        "gain over fresh noise, dB": mean_of(ours - theirs),
    }


def variations(system: System, data: HeldOut, options: argparse.Namespace, name: str, distance: Distance) -> Figures:
    """Returns what two variations of each image keep of it, and their distance.

    An attribute counts as kept if both variations have it, so that images are independent examples.
    """
    figures: Figures = {}
    for how, settings in (("", {}), ("guidance 2: ", {"guidance": 2.0})):
        found = system.variations(pillow(data), num=2, seed=options.seed, progress=True, decoder=settings).numpy
        figures |= {f"{how}{measure}": figure for measure, figure in pair_figures(found, data, name, distance).items()}
    return figures


def pair_figures(found: np.ndarray, data: HeldOut, name: str, distance: Distance) -> Figures:
    """Returns the figures of `variations`, for two images of each of ``data``."""
    pairs = found.reshape(-1, 2, *found.shape[1:])
    one, other = (measured.read_all(pairs[:, sample]) for sample in range(2))

    def both(*attributes: str) -> Figure:
        first, second = (
            [measured.hits(each, scenes, *attributes) for scenes in (data.scenes, [*data.scenes[1:], data.scenes[0]])]
            for each in (one, other)
        )
        ours, theirs = (share_of(left & right) for left, right in zip(first, second, strict=True))
        return ours.compared(theirs, "another image")

    apart = in_chunks(distance, pairs[:, 0], pairs[:, 1])
    unrelated = in_chunks(distance, pairs[:, 0], np.roll(pairs[:, 1], 1, axis=0))
    return {
        "colour and shape kept": both("colour", "shape"),
        "colour, shape, size and background kept": both("colour", "shape", "size", "background"),
        f"between two variations, {name}": mean_of(apart).compared(mean_of(unrelated), "of different images"),
    }


def interpolation(system: System, data: HeldOut, options: argparse.Namespace, name: str, distance: Distance) -> Figures:
    """Returns the PSNR at the end points of paths between pairs of images, and the evenness of the paths.

    Even frames are decoded in as few steps as text differences, since many are generated for each path.
    """
    images, ends, shared = pillow(data), [], {"frames": FRAMES, "eta": 0.0, "seed": options.seed}
    evenness: dict[str, list[float]] = {"equal rotations": [], f"even frames, {options.edit_steps} steps": []}
    for first in tqdm.tqdm(range(0, len(images) - 1, 2), desc="interpolation", unit="path"):
        pair = images[first : first + 2]
        ways = {"decoder": {"steps": options.steps}}, {"even": distance, "decoder": {"steps": options.edit_steps}}
        paths = [system.interpolate(pair, **how, **shared).numpy for how in ways]
        ends.append(psnr_of(paths[0][[0, -1]], data.images[first : first + 2]).mean())
        for path, found in zip(paths, evenness.values(), strict=True):
            between = in_chunks(distance, path[:-1], path[1:])
            found.append(between.max() / between.mean())
    figures: Figures = {f"PSNR at both ends, {options.steps} steps, dB": mean_of(ends)}
    for how, found in evenness.items():
        figures[f"{how}: largest step over the mean step, {name}"] = mean_of(found)
        figures[f"{how}: paths whose largest step is at most {EVEN} mean steps"] = share_of(np.asarray(found) <= EVEN)
        figures[f"{how}: largest step over the mean step of the least even path"] = Figure(
            float(np.max(found)), len(found)
        )
    return figures


def recoloured(scene: Scene, random: np.random.Generator) -> Scene:
    """Returns a scene of one object with another colour."""
    [thing] = scene.objects
    colour = random.choice([name for name in COLOURS if name != thing.colour])
    return Scene((dataclasses.replace(thing, colour=str(colour)),), scene.background)


PAPER: Mapping[str, Any] = {"depth": 1.0, "prompt": ""}
"""The paper's text differences: inverted to the end of the schedule, and without captions in the decoder."""


def text_diff(system: System, data: HeldOut, options: argparse.Namespace) -> Figures:
    """Returns the shares of images whose colour is changed by a text difference, and of those that keep the rest.

    Of the paper's way there is only whether the colour is changed, and whether all is right.
    """
    random, thetas = np.random.default_rng(options.seed), options.theta
    targets = [recoloured(scene, random) for scene in data.scenes]
    captions = [[grammar.captions(scene)[0] for scene in pair] for pair in zip(data.scenes, targets, strict=True)]
    edits = list(zip(pillow(data), captions, strict=True))
    shared = {"frames": 2, "theta": thetas, "seed": options.seed, "decoder": {"steps": options.edit_steps}}
    figures: Figures = {}
    for title, how in (("", {}), ("as in the paper, ", PAPER)):
        bar = tqdm.tqdm(edits, desc=f"{title}text_diff", unit="image")
        edited = [system.text_diff(image, *pair, **how, **shared).numpy for image, pair in bar]
        for frame, theta in enumerate(thetas):
            found = changed(edited, frame, data, targets)
            if title:
                found = [row for row in found if row[0] in ("colour changed", ALL)]
            figures |= {f"{title}theta {theta:g}: {name}": figure for name, figure in found}
    return figures


def changed(edited: list[np.ndarray], frame: int, data: HeldOut, targets: list[Scene]) -> list[tuple[str, Figure]]:
    """Returns what one frame of each edit has of its target, and of the image that it started from."""
    readings = measured.read_all(np.stack([frames[frame] for frames in edited]))
    places = measured.read_all(data.images)
    here = np.asarray([same_place(seen, given) for seen, given in zip(readings, places, strict=True)])
    there = np.asarray(
        [same_place(seen, given) for seen, given in zip(readings, [*places[1:], places[0]], strict=True)]
    )
    rest = ("shape", "size", "background")
    unchanged = measured.hits(readings, data.scenes, "colour", *rest) & here
    whole = measured.hits(readings, targets, "colour", *rest)
    others = measured.hits(readings, [*targets[1:], targets[0]], "colour", *rest)
    return [
        ("colour changed", kept(readings, targets, "colour")),
        ("shape kept", kept(readings, targets, "shape")),
        ("size kept", kept(readings, targets, "size")),
        ("background kept", kept(readings, targets, "background")),
        (f"place kept, within {PLACE:g} sides", share_of(here).compared(share_of(there), "another image")),
        (ALL, share_of(whole & here).compared(share_of(others & there), "another image")),
        ("nothing changed", share_of(unchanged)),
    ]


def same_place(seen: Scene, given: Scene) -> bool:
    """Returns whether both show one object, with centroids at most `PLACE` apart."""
    if len(seen.objects) != 1 or len(given.objects) != 1:
        return False
    return bool(np.hypot(seen.objects[0].x - given.objects[0].x, seen.objects[0].y - given.objects[0].y) <= PLACE)


def pillow(data: HeldOut) -> list[Image.Image]:
    """Returns the images as Pillow images."""
    return [Image.fromarray(image) for image in data.images]


def psnr_of(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the PSNR of each image to the other of the same index, in dB."""
    return np.asarray([psnr(image, other) for image, other in zip(images, others, strict=True)])


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = measured.make_parser(
        "editing", "Measures the editing methods.", "python benchmarks/editing.py --system shapes"
    )
    parser.add_argument("--num", type=args.positive_int, default=128, help="images of text_diff (default %(default)s)")
    help_text = "images that are inverted for reconstruction and interpolation, an even number (default %(default)s)"
    parser.add_argument("--inverted", type=args.positive_int, default=32, help=help_text)
    parser.add_argument(
        "--varied", type=args.positive_int, default=64, help="images of variations (default %(default)s)"
    )
    parser.add_argument(
        "--steps", type=args.positive_int, default=250, help="DDIM steps of the inverted images (default %(default)s)"
    )
    parser.add_argument(
        "--edit_steps", type=args.positive_int, default=50, help="DDIM steps of text_diff (default %(default)s)"
    )
    parser.add_argument(
        "--theta", type=args.fraction_or_two, default=(0.25, 0.5), help="rotations of text_diff (default 0.25,0.5)"
    )
    parser.add_argument("--lpips", type=args.path, metavar="DIR", help="folder of an imported LPIPS")
    return parser


def main() -> None:
    """Runs the command line."""
    options = make_parser().parse_args()
    if not isinstance(options.theta, tuple):
        raise UsageError(f"--theta must be two numbers, as in 0.25,0.5, got {options.theta}")
    if options.inverted % 2:
        raise UsageError(f"--inverted must be even, because images are interpolated in pairs, got {options.inverted}")
    name, distance = measured.make_distance(options.lpips)
    system = load(options.system)
    data = measured.held_out(system, max(options.num, options.inverted, options.varied))
    if any(len(scene.objects) != 1 for scene in data.scenes):
        raise UsageError(f"{options.system} was trained on scenes of two objects: these measures edit one")
    parts: dict[str, Callable[[], Figures]] = {
        "reconstruction": lambda: reconstruction(system, data.first(options.inverted), options),
        "variations": lambda: variations(system, data.first(options.varied), options, name, distance),
        "interpolation": lambda: interpolation(system, data.first(options.inverted), options, name, distance),
        "text_diff": lambda: text_diff(system, data.first(options.num), options),
    }
    figures: Figures = {}
    for method, part in parts.items():
        found = part()
        measured.emit("editing", found, method=method, system=measured.shown_system(options.system))
        figures |= {f"{method}: {measure}": figure for measure, figure in found.items()}
    measured.publish("editing", measured.table(figures), options.page)


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
