"""Images of every editing method for docs/howto/editing.md, made by a system of emoji: one small PNG file for each.

    python benchmarks/emoji_figures.py --system emoji --data runs/emoji-small --page docs/howto/editing.md

``--only mix`` makes one of them. Given images are emoji of the data set, of all its splits.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import argparse
from collections.abc import Callable

import measured
import numpy as np
import sheets
from jaxtyping import UInt8
from sheets import Sheet

from dalle2_jax import data
from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.errors import UsageError, choose
from dalle2_jax.system.inputs import read_image
from dalle2_jax.system.system import System, load

COLUMNS = 8

SPLITS = ("train", "val", "compositional")

COUNTS = (4, 8, 16, 24, 32, 48, 64, 96)
"""Numbers of principal components."""

EMBEDDED = 1024
"""Images whose embeddings the components are measured on."""

ERASED = np.uint8(128)
"""Grey level of what is regenerated."""

Pixels = UInt8[np.ndarray, "H W 3"]


class Emoji:
    """Images of the data set.

    Args:
      folder: of the data set.
      side: of the images, in pixels.
    """

    def __init__(self, folder: pathlib.Path, side: int):
        self.folder, self.side = folder, side

    def image(self, style: str, code: str) -> Pixels:
        """Returns an emoji by its style and code points. UsageError if there is none."""
        for split in SPLITS:
            path = self.folder / split / style / f"{code}.png"
            if path.exists():
                return read_image(path).pixels
        raise UsageError(f"{self.folder} has no image {code} of style {style}: make it with `dalle2 data emoji`")

    def train(self, count: int) -> Pixels:
        """Returns images of training, evenly spaced."""
        source = data.source_named(f"folder:{self.folder}", "train", self.side)
        return source.select(("image",)).fetch(np.linspace(0, len(source) - 1, count).astype(int))["image"]


def variations(system: System, emoji: Emoji, shared: dict) -> Sheet:
    """Emoji, and images that the decoder generates from their CLIP embeddings."""
    given = [emoji.image(*name) for name in (("noto", "1f34e"), ("fluent_3d", "1f419"), ("twemoji", "1f355"))]
    found = system.variations(given, num=COLUMNS - 1, **shared).numpy
    rows = found.reshape(len(given), COLUMNS - 1, *found.shape[1:])
    return Sheet([[image, *row] for image, row in zip(given, rows, strict=True)], ["given", *[""] * (COLUMNS - 1)])


def interpolation(system: System, emoji: Emoji, shared: dict) -> Sheet:
    """Paths between two emoji, from one fresh noise, from the noises of both, and even; and between two captions."""
    pair = [emoji.image("noto", "1f34e"), emoji.image("noto", "1f34b")]
    captions = ["a cat face, fluent flat emoji", "a panda, fluent flat emoji"]
    path = {"frames": COLUMNS, **shared}
    found = [
        system.interpolate(pair, **path),
        system.interpolate(pair, eta=0.0, **path),
        system.interpolate(pair, eta=0.0, even=True, **path),
        system.interpolate(captions=captions, **path),
    ]
    return Sheet([images.numpy for images in found], ["first", *[""] * (COLUMNS - 2), "second"])


def mix(system: System, emoji: Emoji, shared: dict) -> Sheet:
    """Two emoji with weights from all of the first to all of the second, for two pairs."""
    weights = np.linspace(0.0, 1.0, COLUMNS - 2)
    pairs = [[("twemoji", "1f431"), ("twemoji", "1f43c")], [("noto", "1f353"), ("noto", "1f33b")]]
    rows = []
    for names in pairs:
        pair = [emoji.image(*name) for name in names]
        mixed = [system.mix(pair, weights=[1 - w, w], num=1, **shared).numpy[0] for w in weights]
        rows.append([pair[0], *mixed, pair[1]])
    return Sheet(rows, ["first", *(f"{weight:.1f}" for weight in weights), "second"])


def text_diff(system: System, emoji: Emoji, shared: dict) -> Sheet:
    """Emoji changed by the difference of two captions at depth 0.4: colour, animal and style."""
    changes = [
        ("noto", "1f34e", "a red apple, noto emoji", "a green apple, noto emoji"),
        ("twemoji", "1f431", "a cat face, twemoji", "a tiger face, twemoji"),
        ("noto", "1f419", "an octopus, noto emoji", "an octopus, fluent 3d emoji"),
    ]
    options = {"frames": COLUMNS, "theta": 0.5, "depth": 0.4, **shared}
    rows = [
        system.text_diff(emoji.image(style, code), before, after, **options).numpy
        for style, code, before, after in changes
    ]
    return Sheet(rows, [f"{theta:.2f}" for theta in np.linspace(0.0, 0.5, COLUMNS)])


def reconstruction(system: System, emoji: Emoji, shared: dict) -> Sheet:
    """Emoji, and their reconstructions from their embedding and inverted noise in 100 steps."""
    codes = ("1f34e", "1f419", "1f33b", "1f98b", "1f353", "1f436", "1f355", "1f438")
    given = [emoji.image("fluent_3d" if place % 2 else "noto", code) for place, code in enumerate(codes)]
    return Sheet([given, system.reconstruct(given, steps=100, **shared).numpy], [""] * COLUMNS)


def components(system: System, emoji: Emoji, shared: dict) -> Sheet:
    """Emoji decoded from projections of their embeddings on the leading components, with one noise for each row."""
    found = measured.components(system, emoji.train(EMBEDDED))
    given = [emoji.image("noto", "1f34e"), emoji.image("twemoji", "1f436")]
    emb = system.embed_image(given)
    columns = [system.decode(found.project(emb, count), **shared).numpy for count in COUNTS]
    return Sheet(list(zip(*columns, strict=True)), list(map(str, COUNTS)))


def inpainting(system: System, emoji: Emoji, shared: dict) -> Sheet:
    """The lower half of a flower regenerated by two captions: the given image, its known part, and samples."""
    given = emoji.image("noto", "1f33b")
    mask = np.zeros(given.shape[:2], bool)
    mask[given.shape[0] // 2 :] = True
    known = np.where(mask[..., None], ERASED, given)
    rows = []
    for prompt in ("a sunflower, noto emoji", "a tulip, noto emoji"):
        found = system.inpaint(given, mask, prompt, num=COLUMNS - 2, resample=(5, 3), **shared)
        rows.append([given, known, *found.numpy])
    return Sheet(rows, ["given", "known", *[""] * (COLUMNS - 2)])


def outpainting(system: System, emoji: Emoji, shared: dict) -> Sheet:
    """An emoji between two regenerated borders of half its width: the given image, and three samples."""
    given = emoji.image("noto", "1f335")
    margin = emoji.side // 2
    found = system.outpaint(given, margins=(margin, margin, 0, 0), num=3, **shared).numpy
    padded = np.pad(given, ((0, 0), (margin, margin), (0, 0)), constant_values=ERASED)
    return Sheet([[padded, *found]], ["given", "", "", ""])


def typography(system: System, emoji: Emoji, shared: dict) -> Sheet:
    """Variations of an apple, and of the same apple with the word "pizza" on it."""
    labels = ["a red apple, noto emoji", "a pizza, noto emoji"]
    found = system.typographic_probe(emoji.image("noto", "1f34e"), "pizza", labels, num=COLUMNS - 1, **shared).numpy
    return Sheet(found.reshape(2, COLUMNS, *found.shape[1:]), ["given", *[""] * (COLUMNS - 1)])


FIGURES: dict[str, Callable[[System, Emoji, dict], Sheet]] = {
    "variations": variations,
    "interpolation": interpolation,
    "mix": mix,
    "text_diff": text_diff,
    "reconstruction": reconstruction,
    "components": components,
    "inpainting": inpainting,
    "outpainting": outpainting,
    "typography": typography,
}


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/emoji_figures.py --system emoji --data runs/emoji-small --page docs/howto/editing.md"
    parser = args.make_parser("python benchmarks/emoji_figures.py", "Makes the images of a page on editing.", example)
    sheets.add_options(parser, "docs/howto/editing.md", FIGURES)
    parser.add_argument("--data", type=args.path, required=True, help="folder that `dalle2 data emoji` made")
    options: argparse.Namespace = parser.parse_args()
    chosen = {name: choose("figure", name, FIGURES) for name in options.only or FIGURES}
    system = load(options.system)
    emoji = Emoji(options.data, measured.image_side(system))
    for name, figure in chosen.items():
        sheet = figure(system, emoji, {"seed": options.seed, "progress": True})
        sheets.write(options.page, name, sheet, figure.__doc__)


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
