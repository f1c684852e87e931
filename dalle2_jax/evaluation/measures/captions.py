"""Measures of images against what their captions ask for: attributes of shapes, digits, concepts of emoji."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from dalle2_jax import data
from dalle2_jax.data.synthetic import digits as digits_data
from dalle2_jax.errors import UserError
from dalle2_jax.evaluation import attributes as scene_attributes
from dalle2_jax.evaluation import digits as digit_reader
from dalle2_jax.evaluation import distances, examples, intervals, references
from dalle2_jax.evaluation.context import Context
from dalle2_jax.evaluation.figures import SHUFFLED, Figure, Figures, share_of
from dalle2_jax.evaluation.measures import rendering
from dalle2_jax.system import load, stored_data
from dalle2_jax.workdir.folder import StageFolder


def attributes(context: Context, num: int) -> Figures:
    """Measures whether colours, shapes, sizes, counts, relations and backgrounds match the captions.

    No scene or caption of split "val" occurs in "train", nor does any of its combinations of colour, shape and size; no
    pair of colour and shape of "compositional" does. ``one_object`` and ``two_objects`` are the shares of images with
    all attributes right, by the number of objects that the caption names.

    ``background_std`` and ``edge_width`` are medians (see `rendering`), with those of real images as the baseline.
    """
    source = shapes_of(context)
    indices = context.indices(num)
    images = context.samples(num).images(num)
    scenes = [source.scene(index) for index in indices]
    rates = scene_attributes.attribute_accuracy(images, scenes, context.captions(num))
    counts = {name: int(count) for name, count in rates["n"].items()}
    matched, shuffled = (
        {name: _share(float(value), counts[name]) for name, value in rates[column].items()}
        for column in ("matched", "shuffled")
    )
    figures = {name: figure.compared(shuffled[name], SHUFFLED) for name, figure in matched.items()}
    real = source.select(("image",)).fetch(indices)["image"]
    return figures | rendering.figures(images, real, context.options.seed)


def _share(value: float, count: int) -> Figure:
    return Figure(value, count, intervals.wilson(value, count), share=True)


def shapes_of(context: Context) -> data.ShapesSource:
    """Returns the data. UserError unless they are ``shapes``."""
    source = context.source
    if not isinstance(source, data.ShapesSource):
        raise UserError(f"attributes can be read from generated shapes only, and the data are {source}")
    return source


def digits(context: Context, num: int) -> Figures:
    """Generates digits and reads them with a classifier that was trained on real scans.

    ``real`` is the classifier's own accuracy on real scans, an upper bound.
    """
    labels = np.arange(num) % 10
    captions = [digits_data.captions_of(int(label))[(place // 10) % 6] for place, label in enumerate(labels)]
    images = context.generated("digits", lambda: captions).images(num)
    rates: dict[str, Any] = dict(digit_reader.digit_accuracy(images, labels))
    counts = rates.pop("n")
    found = {name: _share(rate, counts[name]) for name, rate in rates.items()}
    return {"accuracy": found["accuracy"].compared(found["shuffled"], SHUFFLED), "real": found["real_val"]}


def check_digits(context: Context, num: int) -> None:
    """Raises UserError unless the system was trained on image files, as on the digits."""
    check_digits_folder(context.system.path)


def check_digits_folder(path: Path) -> None:
    """Raises UserError unless the system in a folder was trained on image files, as on the digits."""
    if not StageFolder(path, "decoder").exists():
        raise UserError(load.missing_stage(path, "decoder"))
    if not stored_data.has_image_files(path, "decoder"):
        raise UserError("digits are read from images of the digits folder alone; this system was trained on other data")


def emoji(context: Context, num: int) -> Figures:
    """Measures whether the real image nearest to a sample shows the concept of its caption, in its style.

    The distance is LPIPS, or that of pixels without it. Candidates are all images of the split and of split "train".
    "top_1" and "top_10" are among the concepts of the caption's style, "style" among all candidates, and "exact" is the
    share whose nearest candidate of all has both the concept and the style. Baselines: shuffled captions; and
    "wrong_style", a real image of the concept in another style in place of the sample, which is what a system reaches
    that ignores the style.
    """
    captioned = _concepts(context.source, context.indices(num))
    candidates, images = _candidates(context)
    samples = context.samples(num).images(num)
    apart = distances.perceptual_distances(samples, images, context.lpips)
    ranks = distances.rank_concepts(apart, *captioned, *candidates)
    order = _shuffled(num, context.options.seed)
    concepts, styles = ([names[place] for place in order] for names in captioned)
    shuffled = distances.rank_concepts(apart, concepts, styles, *candidates)
    figures = {
        "top_1": share_of(ranks.top(1)).compared(share_of(shuffled.top(1)), SHUFFLED),
        "top_10": share_of(ranks.top(10)).compared(share_of(shuffled.top(10)), SHUFFLED),
        "style": share_of(ranks.same_style).compared(share_of(shuffled.same_style), SHUFFLED),
        "exact": share_of(_exact(apart, captioned, candidates)).compared(
            share_of(_exact(apart, (concepts, styles), candidates)), SHUFFLED
        ),
    }
    return figures | _wrong_style(context, captioned, candidates, images)


def _exact(
    apart: Float[np.ndarray, "N M"], captioned: tuple[list[str], list[str]], candidates: tuple[list[str], list[str]]
) -> Bool[np.ndarray, "N"]:
    """Returns whether the nearest candidate of each image has the concept and the style of its caption."""
    nearest = apart.argmin(axis=1)
    known, wanted = list(zip(*candidates, strict=True)), zip(*captioned, strict=True)
    return np.asarray([known[place] == pair for place, pair in zip(nearest, wanted, strict=True)])


def _wrong_style(
    context: Context,
    captioned: tuple[list[str], list[str]],
    candidates: tuple[list[str], list[str]],
    images: np.ndarray,
) -> Figures:
    """Returns how often the real image of the concept in another style is nearest to it, in place of a sample.

    Of several other styles the best counts; concepts without another style are omitted.
    """
    concepts, styles = captioned
    chosen = [
        (number, place)
        for number, (concept, style) in enumerate(zip(concepts, styles, strict=True))
        for place, (name, other) in enumerate(zip(*candidates, strict=True))
        if name == concept and other != style
    ]
    if not chosen:
        return {}
    numbers, places = map(list, zip(*chosen, strict=True))
    apart = distances.perceptual_distances(images[places], images, context.lpips)
    named = [[names[number] for number in numbers] for names in captioned]
    ranks = distances.rank_concepts(apart, named[0], named[1], *candidates).rank
    best = np.asarray([min(ranks[np.equal(numbers, number)]) for number in dict.fromkeys(numbers)])
    return {"wrong_style_top_1": share_of(best <= 1), "wrong_style_top_10": share_of(best <= 10)}


def check_emoji(context: Context, num: int) -> None:
    """Raises UserError unless the data have concepts and styles."""
    _concepts(context.source, context.indices(num)[:1])


def _candidates(context: Context) -> tuple[tuple[list[str], list[str]], np.ndarray]:
    """Returns concepts and styles of the real images, and the images: of the split and of split "train", each once."""
    concepts: list[str] = []
    styles: list[str] = []
    images: list[np.ndarray] = []
    seen: set[tuple[str, str]] = set()
    for split in dict.fromkeys((context.split, "train")):
        source = context.source if split == context.split else context.open("decoder", split, context.size)
        indices = range(len(source))
        found = list(zip(*_concepts(source, indices), strict=True))
        new = [place for place in indices if found[place] not in seen and not seen.add(found[place])]
        concepts += [found[place][0] for place in new]
        styles += [found[place][1] for place in new]
        images += [*references.chunks(source, new)] if new else []
    return (concepts, styles), np.concatenate(images)


def _concepts(source: data.Source, indices: Sequence[int]) -> tuple[list[str], list[str]]:
    """Returns the concept and the style of examples. DataError if their records have none."""
    return examples.fields(source, indices, "concept"), examples.fields(source, indices, "style")


def _shuffled(count: int, seed: int) -> list[int]:
    """Returns another place for each place, in a cycle through a random order."""
    order = np.random.default_rng(seed).permutation(count)
    other = np.empty(count, int)
    other[order] = np.roll(order, 1)
    return other.tolist()
