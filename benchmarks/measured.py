"""What the benchmarks of systems share: held-out scenes of ``shapes``, distances of images, and tables of figures."""

import argparse
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import common
import numpy as np
from jaxtyping import Float, UInt8

from dalle2_jax import pretrained
from dalle2_jax.cli import args
from dalle2_jax.config import sources
from dalle2_jax.config.stored import stored_experiment
from dalle2_jax.data import ShapesSource
from dalle2_jax.data.synthetic.scene_reader import matches, read_scene
from dalle2_jax.data.synthetic.scenes import Scene
from dalle2_jax.data.synthetic.shapes import render
from dalle2_jax.errors import UsageError
from dalle2_jax.evaluation import lpips
from dalle2_jax.evaluation.figures import Figure, Figures, share_of
from dalle2_jax.files import write_atomically
from dalle2_jax.system.editing.components import Components
from dalle2_jax.system.editing.similarity import Distance, root_mean_square
from dalle2_jax.system.generation import IMAGE_STAGES
from dalle2_jax.system.system import System
from dalle2_jax.workdir.folder import StageFolder

Pixels = UInt8[np.ndarray, "N H W 3"]


class HeldOut(NamedTuple):
    """Scenes of a split that is not trained on.

    Attributes:
      scenes: what the images show.
      captions: the fixed caption of each.
      images: rendered at the size of the system's images.
    """

    scenes: Sequence[Scene]
    captions: Sequence[str]
    images: Pixels

    def first(self, count: int) -> "HeldOut":
        """Returns the first scenes."""
        return HeldOut(self.scenes[:count], self.captions[:count], self.images[:count])


def held_out(system: System, count: int, split: str = "val") -> HeldOut:
    """Returns the first scenes of one object of a split of the data that a system was trained on.

    Raises:
      UsageError: the system was not trained on shapes.
    """
    experiment = stored_experiment(StageFolder(system.path, "decoder"))
    source = None if experiment is None else sources.open_source(experiment.data, split)
    if not isinstance(source, ShapesSource):
        raise UsageError(f"{system.path} was not trained on shapes, whose attributes these measures read")
    side = image_side(system)
    alone = (index for index in range(len(source)) if len(source.scene(index).objects) == 1)
    indices = list(itertools.islice(alone, count))
    scenes = [source.scene(index) for index in indices]
    captions = [source.caption(index) for index in indices]
    return HeldOut(scenes, captions, np.stack([render(scene, side) for scene in scenes]))


def image_side(system: System) -> int:
    """Returns the side of the images that a system generates, in pixels."""
    return [system.stages[name].stage.image_size for name in IMAGE_STAGES if name in system.stages][-1]


def components(system: System, images: Pixels) -> Components:
    """Returns the principal components of the CLIP embeddings of images."""
    emb = system.embed_image(list(images)).astype(np.float64)
    return Components.of(emb.mean(axis=0), np.cov(emb.T, bias=True), len(emb))


def read_all(images: Pixels) -> list[Scene]:
    """Returns what each image shows."""
    return [read_scene(image) for image in images]


def hits(readings: Sequence[Scene], scenes: Sequence[Scene], *attributes: str) -> np.ndarray:
    """Returns whether each reading has all of these attributes of its scene, and as many objects."""
    judged = [matches(reading, scene) for reading, scene in zip(readings, scenes, strict=True)]
    return np.asarray([all(found[name] for name in ("count", *attributes)) for found in judged])


def kept(readings: Sequence[Scene], scenes: Sequence[Scene], *attributes: str) -> Figure:
    """Returns the share of readings with these attributes of their scene; the baseline is the next image's scene."""
    others = [*scenes[1:], scenes[0]]
    ours, theirs = (share_of(hits(readings, each, *attributes)) for each in (scenes, others))
    return ours.compared(theirs, "another image")


def make_distance(folder: pathlib.Path | None) -> tuple[str, Distance]:
    """Returns the name of a distance and the distance: LPIPS of a folder, else the root mean squared difference."""
    if folder is None:
        return "RMS of pixels, levels of 255", root_mean_square
    return "LPIPS", lpips.load(folder)


def in_chunks(distance: Distance, images: Pixels, others: Pixels, size: int = 32) -> Float[np.ndarray, "N"]:
    """Returns a distance of many images, computed ``size`` at a time."""
    starts = range(0, len(images), size)
    return np.concatenate([distance(images[start : start + size], others[start : start + size]) for start in starts])


# --- results --------------------------------------------------------------------------------


def make_parser(name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that these benchmarks share."""
    parser = args.make_parser(f"python benchmarks/{name}.py", summary, example)
    parser.add_argument("--system", type=args.system, required=True, help=args.SYSTEM)
    parser.add_argument("--seed", type=int, default=0, help="random seed (default %(default)s)")
    parser.add_argument("--page", type=pathlib.Path, help="a page whose table of this benchmark is replaced")
    return parser


def shown_system(path: pathlib.Path) -> str:
    """Returns the name of a system that comes with the package, else its path."""
    return pretrained.name_of(path) or str(path)


def emit(benchmark: str, figures: Mapping[str, Figure], **settings: object) -> None:
    """Prints a JSON line for each figure."""
    for name, figure in figures.items():
        common.emit(benchmark=benchmark, measure=name, **figure.to_json(), **settings)


def table(figures: Figures) -> str:
    """Returns figures as a table in Markdown, with their baselines."""
    lines = ["| measure | n | result | baseline |", "| --- | --- | --- | --- |"]
    for name, figure in figures.items():
        baseline = f"{figure.baseline} ({figure.against})" if figure.baseline else "-"
        lines.append(f"| {name} | {figure.n} | {figure} | {baseline} |")
    return "\n".join(lines) + "\n"


def publish(name: str, text: str, page: pathlib.Path | None) -> None:
    """Prints a table, and writes it to its place on a page."""
    print(text)
    if page is not None:
        put(page, name, text)


def put(page: pathlib.Path, name: str, text: str) -> None:
    """Replaces what a page has between ``<!-- NAME -->`` and ``<!-- /NAME -->``.

    Raises:
      UsageError: as `around`.
    """
    before, after = around(page, name)
    write_atomically(page, f"{before}\n\n{text.strip()}\n\n{after}")


def around(page: pathlib.Path, name: str) -> tuple[str, str]:
    """Returns what a page has up to ``<!-- NAME -->`` and from ``<!-- /NAME -->`` on.

    Raises:
      UsageError: there is no such page, or it has no such place.
    """
    if not page.is_file():
        raise UsageError(f"there is no page {page}")
    before, start, rest = page.read_text().partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not end:
        raise UsageError(f"{page} has no place for {name}: write <!-- {name} --> and <!-- /{name} -->")
    return before + start, end + after
