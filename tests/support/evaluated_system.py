"""A tiny system for tests of measures, a network whose features are known, and a generator of real images."""

import jax.numpy as jnp
import numpy as np
from written_system import write_system

import dalle2_jax as d2
from dalle2_jax import data
from dalle2_jax.evaluation import context
from dalle2_jax.evaluation.features import FeatureNetwork
from dalle2_jax.evaluation.lpips import Lpips

SIDE = 16
"""Of the images that the tiny system generates."""


def load(root, seed=0):
    """Writes the system and loads it."""
    return d2.load(write_system(root, seed))


def network(name="vgg16", label="VGG16", dims=4, seen=None):
    """A network of random projections of the mean colour; ``seen`` collects the number of images of each batch."""
    weights = np.random.default_rng(0).normal(size=(3, dims)).astype(np.float32)

    def encode(images):
        if seen is not None:
            seen.append(len(images))
        return jnp.asarray(images, jnp.float32).mean((1, 2)) @ weights / jnp.float32(255)

    return FeatureNetwork(name, label, None, 4, dims, dims, "feed", encode, lambda features: 3 * features)


def pixel_distance():
    """The mean squared difference of pixels in place of LPIPS."""

    def encode(images):
        flat = jnp.asarray(images, jnp.float32).reshape(len(images), -1)
        return flat / jnp.float32(255 * flat.shape[1] ** 0.5)

    def compare(images, others):
        return jnp.sum(jnp.square(encode(images) - encode(others)), axis=1)

    return Lpips("lpips_vgg16", 4, "feed", encode, compare)


class Shapes:
    """Generates the real images of a split of shapes, in place of a system."""

    def __init__(self, side, split="val", **fields):
        self.source = data.ShapesSource(split, side, max_objects=1, **fields)
        self.batches = []

    def __call__(self, generator, condition, first, captions):
        self.batches.append((condition, first, len(captions)))
        places = [(first + place) % len(self.source) for place in range(len(captions))]
        return self.source.fetch(places)["image"]


def generating(monkeypatch, generate, size=SIDE):
    """Replaces the cascade by a function; images have a side of ``size``."""
    monkeypatch.setattr(context, "generate", generate)
    monkeypatch.setattr(context.Context, "size", size)
    return generate
