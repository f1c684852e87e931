"""Measures of images against what their captions ask for: attributes of shapes, digits, concepts of emoji."""

import numpy as np

from dalle2_jax import data
from dalle2_jax.data.synthetic import digits as digits_data
from dalle2_jax.errors import DataError, UserError
from dalle2_jax.evaluation import attributes as scene_attributes
from dalle2_jax.evaluation import digits as digit_reader
from dalle2_jax.evaluation import intervals
from dalle2_jax.evaluation.context import Context
from dalle2_jax.evaluation.figures import SHUFFLED, Figure, Figures, mean_of
from dalle2_jax.evaluation.measures import rendering
from dalle2_jax.system import load, stored_data
from dalle2_jax.workdir.folder import StageFolder


def attributes(context: Context, num: int) -> Figures:
    """Measures whether colours, shapes, sizes, counts, relations and backgrounds match the captions.

    Captions and scenes of split "val" are sampled independently of those of "train", but there are few different
    captions: most of them occur there too. No pair of colour and shape of "compositional" does.

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
    rates = digit_reader.digit_accuracy(images, labels)
    counts = rates.pop("n")
    found = {name: _share(float(rate), counts[name]) for name, rate in rates.items()}
    return {"accuracy": found["accuracy"].compared(found["shuffled"], SHUFFLED), "real": found["real_val"]}


def check_digits(context: Context, num: int) -> None:
    """Raises UserError unless the system was trained on image files, as on the digits."""
    path = context.system.path
    if not StageFolder(path, "decoder").exists():
        raise UserError(load.missing_stage(path, "decoder"))
    if not stored_data.has_image_files(path, "decoder"):
        raise UserError("digits are read from images of the digits folder alone; this system was trained on other data")
