"""The feature networks that can be imported: what each reads and gives, and the programs that compute it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dalle2_jax.evaluation.features.network import INCEPTION, FeatureNetwork
from dalle2_jax.evaluation.features.placement import place
from dalle2_jax.evaluation.features.preparation import Preparation
from dalle2_jax.training.sharding import replicated
from dalle2_jax.types import Array, Params
from dalle2_jax.weights.features.table import NETWORKS, shapes


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What a published network reads and gives.

    Attributes:
      label: name of the network in the names of measures.
      stored: names under which its weights are stored, see ``weights.features.table.NETWORKS``.
      preparation: how images become its input.
      dims: number of features.
      classes: number of classes; 0 for a network that does not classify.
      head: name of the layer from features to logits; "" for a network that does not classify.
      head_bias: whether logits include the bias of that layer.
      min_size: smallest side of images, in pixels.
    """

    label: str
    stored: tuple[str, ...]
    preparation: Preparation
    dims: int
    classes: int = 0
    head: str = ""
    head_bias: bool = True
    min_size: int = 1


_FID = Preparation(299, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "linear", antialias=False)

ENCODERS: Mapping[str, Encoder] = {
    # The Inception score is defined by logits without bias (Salimans et al. 2016, their code).
    INCEPTION: Encoder("Inception", ("inception",), _FID, 2048, 1008, "fc", head_bias=False),
    "vgg16": Encoder("VGG16", ("vgg16", "vgg16_fc7", "lpips_vgg16"), Preparation(None), 512, min_size=32),
    "vgg16_fc7": Encoder("VGG16-fc7", ("vgg16_fc7",), Preparation(224, resample="linear"), 4096, 1000, "classifier.6"),
    "efficientnet_lite0": Encoder("EfficientNet-Lite0", ("efficientnet_lite0",), Preparation(224), 1280, 1000, "_fc"),
    "dinov2_vits14": Encoder("DINOv2-S", ("dinov2_vits14",), Preparation(224), 384),
    "dinov2_vitb14": Encoder("DINOv2-B", ("dinov2_vitb14",), Preparation(224), 768),
}
"""Feature networks by name."""


def names_in(stored: str) -> tuple[str, ...]:
    """Returns the names of the feature networks that stored weights give, the most specific first."""
    return tuple(sorted((name for name, each in ENCODERS.items() if stored in each.stored), key=lambda n: n != stored))


def make_network(name: str, variables: Params, fingerprint: str, mesh: Mesh) -> FeatureNetwork:
    """Returns a feature network.

    Args:
      name: a key of `ENCODERS`.
      variables: its arrays, and maybe those of layers that it does not use.
      fingerprint: hash of the arrays.
      mesh: the devices.
    """
    encoder, module = ENCODERS[name], NETWORKS[name].module
    placed = jax.device_put(_used(name, variables), replicated(mesh))

    def features(variables: Params, images: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):  # the same figures on every device
            return module.apply(variables, encoder.preparation(images)).features

    def logits(variables: Params, features: jax.Array) -> jax.Array:
        layer = variables["params"][encoder.head]
        product = jnp.matmul(features, layer["kernel"], precision="highest")
        return product + layer["bias"].reshape(1, -1) if encoder.head_bias else product

    encode, classify = jax.jit(features), jax.jit(logits)

    def encode_images(images: Array) -> jax.Array:
        return encode(placed, place(images, mesh))

    def classify_features(features: Array) -> jax.Array:
        return classify(placed, place(features, mesh))

    return FeatureNetwork(
        name=name,
        label=encoder.label,
        image_size=encoder.preparation.size,
        min_size=encoder.min_size,
        dims=encoder.dims,
        classes=encoder.classes,
        fingerprint=fingerprint,
        encode=encode_images,
        classify=classify_features if encoder.head else None,
        devices=mesh.size,
    )


def _used(name: str, variables: Params) -> dict[str, Any]:
    """Returns the variables of the layers that a network has."""
    layers = shapes(NETWORKS[name])
    return {collection: {layer: variables[collection][layer] for layer in tree} for collection, tree in layers.items()}
