"""The feature networks that can be imported, and the conversion table of each.

The modules of a network have the names of its published tensors, so that one function makes every table.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.errors import WeightsError
from dalle2_jax.models.features.dinov2 import Dinov2, Dinov2Config
from dalle2_jax.models.features.efficientnet import EfficientNetLite0
from dalle2_jax.models.features.inception import Inception
from dalle2_jax.models.features.vgg import Lpips, VggClassifier, VggFeatures
from dalle2_jax.types import Params
from dalle2_jax.weights.rules import CONV, DENSE, SAME, Layout, Rule


@dataclasses.dataclass(frozen=True)
class PublishedNetwork:
    """A published image network.

    Attributes:
        family: what it is, for messages.
        module: the network.
        image_size: side of its input, in pixels; of a network for any size, one that it accepts.
        layers: number of layers of a scanned transformer, whose tensors are called "blocks.0." and so on.
        ignored: regular expressions of published tensors that the features do not depend on.
    """

    family: str
    module: Any
    image_size: int
    layers: int = 0
    ignored: tuple[str, ...] = ()


_COUNTERS = (r".*\.num_batches_tracked",)
_LPIPS_EXTRA = (r"classifier\..*", r"lins\..*", r"scaling_layer\..*")

NETWORKS: Mapping[str, PublishedNetwork] = {
    "inception": PublishedNetwork("FID's InceptionV3", Inception(), 299, ignored=_COUNTERS),
    "vgg16": PublishedNetwork("VGG16 without classifier", VggFeatures(), 64),
    "vgg16_fc7": PublishedNetwork("VGG16", VggClassifier(), 224),
    "lpips_alexnet": PublishedNetwork("LPIPS of AlexNet", Lpips("alexnet"), 64, ignored=_LPIPS_EXTRA),
    "lpips_vgg16": PublishedNetwork("LPIPS of VGG16", Lpips("vgg16"), 64, ignored=_LPIPS_EXTRA),
    "efficientnet_lite0": PublishedNetwork("EfficientNet-Lite0", EfficientNetLite0(), 224, ignored=_COUNTERS),
    "dinov2_vits14": PublishedNetwork("DINOv2 ViT-S/14", Dinov2(), 224, 12),
    "dinov2_vitb14": PublishedNetwork("DINOv2 ViT-B/14", Dinov2(Dinov2Config(768, 12, 12)), 224, 12),
}
"""Feature networks by the name that they are stored under."""

_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
"""Flax's names of leaves -> torch's. All other names are equal."""


@functools.cache
def shapes(network: PublishedNetwork) -> Params:
    """Returns the shapes of a network's variables: {"params": ..., "batch_stats": ...}."""
    image = jax.ShapeDtypeStruct((1, network.image_size, network.image_size, 3), jnp.float32)
    return jax.eval_shape(network.module.init, jax.random.key(0), image)


def rules(abstract: Params, layers: int = 0) -> list[Rule]:
    """Returns the conversion table of a network whose modules are named as its published tensors.

    Args:
        abstract: shapes of its variables.
        layers: as in `PublishedNetwork`.
    """
    table = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        place = jax.tree_util.keystr(path, simple=True, separator="/")
        _, *modules, name = place.split("/")
        key = ".".join([*modules, _NAMES.get(name, name)])
        stacked = modules[:1] == ["blocks"]
        numbered = [key.replace("blocks.", f"blocks.{layer}.", 1) for layer in range(layers)] if stacked else [key]
        groups = tuple((each,) for each in numbered)
        table.append(Rule(place, groups, _layout(name, leaf.ndim - stacked), stacked))
    return table


def _layout(name: str, ndim: int) -> Layout:
    if name.startswith("lin"):
        return _HEAD
    return {4: CONV, 2: DENSE}[ndim] if name == "kernel" else SAME


def _join_head(tensors: Sequence[np.ndarray]) -> np.ndarray:
    (value,) = tensors
    if not (np.isfinite(value) & (value >= 0)).all():
        raise WeightsError("weights of LPIPS must be finite and at least 0")
    return value.reshape(-1)


_HEAD = Layout(_join_head, lambda leaf: (leaf.reshape(1, -1, 1, 1),))
"""A head of LPIPS: a 1x1 convolution [1, C, 1, 1] of weights that are not negative <-> [C]."""
