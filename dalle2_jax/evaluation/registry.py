"""The measures of ``dalle2 evaluate`` by name: what each reads, and how many examples it takes by default.

Imports nothing heavy: the command line lists the measures in its help.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from dalle2_jax.errors import ConfigError, UsageError, choose

CASCADE, CLIP, PRIOR, STAGE = "cascade", "clip", "prior", "stage"
"""Parts of a system that a measure loads: all stages that generate images; CLIP; CLIP and the prior; single stages."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """A measure.

    Attributes:
      summary: what it measures.
      loads: `CASCADE`, `CLIP`, `PRIOR` or `STAGE`.
      num: number of examples, unless the user gives another.
      network: whether it compares features of an image network (``--features``).
      split: split of the data, unless the user gives another.
      swept: whether it is measured again for each of several guidance scales.
    """

    summary: str
    loads: str
    num: int
    network: bool = False
    split: str = "val"
    swept: bool = False


MEASURES: Mapping[str, Measure] = {
    "attributes": Measure("shapes: colour, shape, size, count, background, flatness, edges", CASCADE, 256, swept=True),
    "digits": Measure("digits: share of images that a classifier reads as requested", CASCADE, 200, swept=True),
    "emoji": Measure("emoji: share of images whose nearest real image has the concept", CASCADE, 256, swept=True),
    "retrieval": Measure("CLIP: recall@1, 5 and 10 between images and captions", CLIP, 64),
    "binding": Measure("CLIP: share of images closer to their caption than to one with parts exchanged", CLIP, 256),
    "zero_shot": Measure("CLIP: share of images whose class is found by its name", CLIP, 256),
    "linear_probe": Measure("CLIP: share of images whose class a linear classifier finds", CLIP, 256),
    "components": Measure("CLIP: principal components of embeddings, for reconstruct", CLIP, 8_192, False, "train"),
    "prior": Measure("prior: cosines of sampled embeddings to true images and captions", PRIOR, 256),
    "ablation": Measure("caption alone, text embedding, prior: three ways to condition the decoder", CASCADE, 64),
    "fd": Measure("images: Fréchet distance of features, FID over Inception", CASCADE, 10_000, True, swept=True),
    "kid": Measure("images: kernel distance of features", CASCADE, 1_000, True, swept=True),
    "inception_score": Measure("images: Inception score", CASCADE, 1_000, True, swept=True),
    "precision_recall": Measure("images: precision and recall of features", CASCADE, 1_000, True, swept=True),
    "cmmd": Measure("images: kernel distance of CLIP embeddings", CASCADE, 1_000, swept=True),
    "clip_score": Measure("images: CLIP's cosine to the caption", CASCADE, 256, swept=True),
    "memorisation": Measure("images: distance to the nearest image of the training data", CASCADE, 256, True),
    "bits_per_dim": Measure("a stage: bound on the negative log-likelihood of images", STAGE, 64),
    "noise_statistics": Measure("a stage: predicted noise, which variance analytic needs", STAGE, 64, False, "train"),
}
"""All measures by name."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A published way to measure: the measures and their settings.

    Attributes:
      measures: names of the measures.
      num: number of captions, of random images of which none is repeated.
      guidance: scale of the decoder.
    """

    measures: tuple[str, ...]
    num: int
    guidance: float


PROTOCOLS: Mapping[str, Protocol] = {"coco30k": Protocol(("fd", "clip_score"), 30_000, 1.25)}
"""Nichol et al. 2021 and Ramesh et al. 2022: the captions of 30,000 random images of COCO's validation set, against all
its images, cropped at the centre; guidance 1.25 (Ramesh et al. 2022, section 5.4)."""


def chosen_measures(names: Sequence[str], protocol: str | None = None) -> tuple[str, ...]:
    """Returns the names of the measures, those of the protocol if none are named.

    Raises:
      UsageError: a name is unknown, with the nearest one.
      ConfigError: neither measures nor a protocol are named.
    """
    for name in names:
        choose("measure", name, MEASURES)
    if protocol is not None:
        of_protocol = choose("protocol", protocol, PROTOCOLS)
        names = names or of_protocol.measures
    if not names:
        raise ConfigError(f"measures is empty: name one or more of {', '.join(MEASURES)}", "measures")
    if len({*names}) < len(names):
        raise UsageError(f"measures names {', '.join(names)}: name each measure once")
    return tuple(names)
