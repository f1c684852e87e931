"""Measures of a loaded system: of the images it generates, of its CLIP, and of each diffusion stage as a model of data.

Every result is a dict of JSON types with the number of examples of each figure, "n", and 95 % intervals, "interval".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dalle2_jax import data
from dalle2_jax.data.synthetic import digits as digits_data
from dalle2_jax.errors import UserError
from dalle2_jax.evaluation import attributes, bound, intervals, retrieval
from dalle2_jax.evaluation import digits as digit_reader
from dalle2_jax.system import load, stored_data
from dalle2_jax.system.images import Images
from dalle2_jax.system.system import System
from dalle2_jax.workdir.folder import StageFolder

NOISE_STATISTICS = "noise_statistics.json"
"""File of a stage with the statistics of its predicted noise."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A measurement of generated images.

    Attributes:
      rates: column -> figure -> a fraction in [0, 1].
      counts: figure -> the number of examples that it is taken over; figures without examples, such as chance, lack.
      images: the images that were measured; None if none were generated.
    """

    rates: Mapping[str, Mapping[str, float]]
    counts: Mapping[str, int]
    images: Images | None = None

    @property
    def intervals(self) -> dict[str, dict[str, intervals.Interval]]:
        """Column -> figure -> its 95 % interval."""
        return {column: intervals.of_shares(rates, self.counts) for column, rates in self.rates.items()}

    def to_json(self) -> dict[str, Any]:
        """Returns the figures with "n" and "interval"; a single column is not nested."""
        if len(self.rates) > 1:
            return {**self.rates, "n": dict(self.counts), "interval": self.intervals}
        [column] = self.rates
        return {**self.rates[column], "n": dict(self.counts), "interval": self.intervals[column]}

    def table(self, title: str) -> str:
        """Returns the figures as a table, in percent."""
        return retrieval.table(title, self.rates, self.counts)


def measure_attributes(
    system: System, source: data.Source, num: int = 256, seed: int = 1, batch_size: int = 64, progress: bool = False
) -> Measured:
    """Generates images for captions of ``shapes`` and reads colours, shapes, sizes and relations from them.

    Captions and scenes of split "val" are sampled independently of those of "train", but there are few different
    captions: most of them occur there too. No pair of colour and shape of "compositional" does.

    Raises:
      UserError: the source is not ``shapes``, or has fewer than ``num`` examples.
    """
    source = check_attributes(source, num)
    captions = [source.caption(index) for index in range(num)]
    images = _generate(system, captions, seed, batch_size, progress)
    scenes = [source.scene(index) for index in range(num)]
    rates: dict[str, Any] = attributes.attribute_accuracy(images.numpy, scenes, captions)
    return Measured({name: rates[name] for name in ("matched", "shuffled")}, rates["n"], images)


def check_attributes(source: data.Source, num: int) -> data.ShapesSource:
    """Returns the source. UserError unless it is ``shapes`` with at least ``num`` examples."""
    if not isinstance(source, data.ShapesSource):
        raise UserError("attributes can be read from generated shapes only; this system was trained on other data")
    check_count(num, source)
    return source


def measure_digits(
    system: System, num: int = 200, seed: int = 1, batch_size: int = 64, progress: bool = False
) -> Measured:
    """Generates digits and reads them with a classifier that was trained on real scans.

    Raises:
      UserError: the system was trained on other data.
    """
    check_digits(system.path)
    labels = np.arange(num) % 10
    captions = [digits_data.captions_of(int(label))[(i // 10) % 6] for i, label in enumerate(labels)]
    images = _generate(system, captions, seed, batch_size, progress)
    rates: dict[str, Any] = dict(digit_reader.digit_accuracy(images.numpy, labels))
    counts = rates.pop("n")
    return Measured({"read right": rates}, counts, images)


def check_digits(system: Path) -> None:
    """Raises UserError unless the system in a folder was trained on image files, as on the digits."""
    if not StageFolder(system, "decoder").exists():
        raise UserError(load.missing_stage(system, "decoder"))
    if not stored_data.has_image_files(system, "decoder"):
        raise UserError("digits are read from the digits folder alone; this system was trained on other data")


def measure_retrieval(system: System, source: data.Source, num: int = 64) -> Measured:
    """Embeds distinct examples with CLIP and measures how often an image's nearest caption is its own (recall@1)."""
    clip = system.stages["clip"]
    indices = retrieval.distinct_examples(source, num)
    prepared = data.prepare(source, clip.tokenizer, clip.context_length or 0)
    batch, _ = data.fixed_batch(prepared, indices, ("image", "tokens", "mask"))
    stage: Any = clip.stage
    image_emb = stage.encode_image(clip.variables, batch.get("image"))
    text_emb = stage.encode_text(clip.variables, batch)["text_emb"]
    rates = retrieval.recall_at_1(np.asarray(image_emb), np.asarray(text_emb))
    return Measured({"recall@1": rates}, dict.fromkeys(("image_to_text", "text_to_image"), len(indices)))


def measure_bits_per_dim(
    system: System, stage: str, source: data.Source, num: int = 64, seed: int = 1, batch_size: int = 16
) -> dict[str, Any]:
    """Returns the bound on the negative log-likelihood of images, in bits per dimension; uniform noise has 8.

    Raises:
      UserError: the stage generates no images, or the source has fewer than ``num`` examples.
    """
    check_count(num, source)
    return bound.bits_per_dim(system.stages, stage, source, num, batch_size, seed)


def measure_noise_statistics(
    system: System, stage: str, source: data.Source, num: int = 64, seed: int = 1, batch_size: int = 16
) -> dict[str, Any]:
    """Measures the noise that a stage predicts at each step, which variance "analytic" needs, and stores it there.

    Raises:
      UserError: the stage is no diffusion, or the source has fewer than ``num`` examples.
    """
    check_count(num, source)
    statistics = bound.noise_statistics(system.stages, stage, source, num, seed, batch_size)
    StageFolder(system.path, stage).write_json(NOISE_STATISTICS, statistics)
    return statistics


def check_count(num: int, source: data.Source) -> None:
    """Raises UserError if a source has fewer than ``num`` examples."""
    if num > len(source):
        raise UserError(f"num {num} is more than the {len(source)} examples of this split: reduce num")


def _generate(system: System, captions: Sequence[str], seed: int, batch_size: int, progress: bool) -> Images:
    """Generates an image for each caption with the system's own sampling."""
    return system.text2image(captions, num=1, seed=seed, batch_size=batch_size, progress=progress)


def image_grid(measured: Measured, count: int = 30) -> UInt8[np.ndarray, "H W 3"] | None:
    """Returns a grid of the first images that were measured; None if none were generated."""
    if measured.images is None:
        return None
    return np.asarray(measured.images[:count].grid(columns=6))
