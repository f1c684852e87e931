"""Images for the figures of Ramesh et al. 2022, made by a system of shapes: one small PNG file for each figure.

    python benchmarks/paper_figures.py --system shapes --page docs/paper.md

Given images are rendered scenes of split ``val``. ``--only figure4`` makes one of them.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import argparse
import dataclasses
from collections.abc import Callable

import measured
import numpy as np
import sheets
from measured import HeldOut
from sheets import Sheet

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.data.synthetic import grammar
from dalle2_jax.data.synthetic.scenes import Scene
from dalle2_jax.errors import UserError, choose
from dalle2_jax.system.system import System, load

COLUMNS = 8

COUNTS = (1, 2, 4, 8, 12, 16, 32, 48)
"""Numbers of principal components; the paper has 20 to 320 of 1,024."""

EMBEDDED = 2048
"""Scenes whose embeddings the components are measured on."""

SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def variations(system: System, data: HeldOut, options: argparse.Namespace) -> Sheet:
    """Figure 3: an image, and images that the decoder generates from its CLIP embedding."""
    given = data.images[:2]
    found = system.variations(list(given), num=COLUMNS - 1, seed=options.seed, progress=True).numpy
    rows = found.reshape(len(given), COLUMNS - 1, *found.shape[1:])
    return Sheet([[image, *row] for image, row in zip(given, rows, strict=True)], ["given", *[""] * (COLUMNS - 1)])


def interpolations(system: System, data: HeldOut, options: argparse.Namespace) -> Sheet:
    """Figure 4: paths between two images, from one fresh noise, from the noises of both, and with even frames."""
    pair = list(data.images[2:4])
    shared = {"frames": COLUMNS, "seed": options.seed, "progress": True}
    ways = ({}, {"eta": 0.0}, {"eta": 0.0, "even": True})
    rows = [system.interpolate(pair, **how, **shared).numpy for how in ways]
    return Sheet(rows, ["first", *[""] * (COLUMNS - 2), "second"])


def text_diffs(system: System, data: HeldOut, options: argparse.Namespace) -> Sheet:
    """Figure 5: an image changed by the difference of two captions, by another colour and by another shape."""
    rows = []
    for place, change in enumerate(({"colour": "blue"}, {"shape": "star"})):
        given = data.scenes[4 + place]
        [thing] = given.objects
        target = Scene((dataclasses.replace(thing, **change),), given.background)
        captions = [grammar.captions(scene)[0] for scene in (given, target)]
        shared = {"frames": COLUMNS, "theta": 0.5, "seed": options.seed, "progress": True}
        rows.append(system.text_diff(data.images[4 + place], *captions, **shared).numpy)
    return Sheet(rows, [f"{theta:.2f}" for theta in np.linspace(0.0, 0.5, COLUMNS)])


def typography(system: System, data: HeldOut, options: argparse.Namespace) -> Sheet:
    """Figure 6: variations of an image, and of the same image with the name of another colour on it."""
    [thing] = data.scenes[6].objects
    word = "blue" if thing.colour != "blue" else "red"
    labels = [f"a {colour} {thing.shape}" for colour in (thing.colour, word)]
    shared = {"num": COLUMNS - 1, "seed": options.seed, "progress": True}
    found = system.typographic_probe(data.images[6], word, labels, **shared)
    return Sheet(found.numpy.reshape(2, COLUMNS, *found.numpy.shape[1:]), ["given", *[""] * (COLUMNS - 1)])


def projections(system: System, data: HeldOut, options: argparse.Namespace) -> Sheet:
    """Figure 7: images decoded from projections of their embeddings, an image a row, with one noise for each row."""
    components = measured.components(system, measured.held_out(system, EMBEDDED, "train").images)
    emb = system.embed_image(list(data.images[:2]))
    counts = [count for count in COUNTS if count <= components.rank]
    columns = [
        system.decode(components.project(emb, count), seed=options.seed, progress=True).numpy for count in counts
    ]
    return Sheet(list(zip(*columns, strict=True)), list(map(str, counts)))


def conditions(system: System, data: HeldOut, options: argparse.Namespace) -> Sheet:
    """Figure 8: the caption alone, its text embedding in place of an image embedding, and the prior's sample."""
    captions = list(data.captions[:COLUMNS])
    shared = {"num": 1, "seed": options.seed, "progress": True}
    rows = [system.text2image(captions, image_emb=source, **shared).numpy for source in ("none", "text", "prior")]
    return Sheet(rows, [""] * COLUMNS)


def guidance(system: System, data: HeldOut, options: argparse.Namespace) -> Sheet:
    """Figure 9: one noise under growing guidance of the decoder, for two captions."""
    shared = {"num": 1, "seed": options.seed, "progress": True}
    columns = [system.text2image(data.captions[:2], decoder={"guidance": scale}, **shared).numpy for scale in SCALES]
    return Sheet(list(zip(*columns, strict=True)), [f"{scale:g}" for scale in SCALES])


FIGURES: dict[str, Callable[[System, HeldOut, argparse.Namespace], Sheet]] = {
    "figure3": variations,
    "figure4": interpolations,
    "figure5": text_diffs,
    "figure6": typography,
    "figure7": projections,
    "figure8": conditions,
    "figure9": guidance,
}


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/paper_figures.py --system shapes --page docs/paper.md"
    parser = args.make_parser("python benchmarks/paper_figures.py", "Makes the figures of docs/paper.md.", example)
    sheets.add_options(parser, "docs/paper.md", FIGURES)
    options = parser.parse_args()
    chosen = {name: choose("figure", name, FIGURES) for name in options.only or FIGURES}
    system = load(options.system)
    data = measured.held_out(system, COLUMNS)
    if any(len(scene.objects) != 1 for scene in data.scenes):
        raise UserError(f"{options.system} was trained on scenes of two objects: these figures edit one")
    for name, figure in chosen.items():
        sheets.write(options.page, name, figure(system, data, options), figure.__doc__)


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
