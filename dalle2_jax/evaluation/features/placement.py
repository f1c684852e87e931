"""Batches on devices: the images of a batch are divided over all devices, weights are replicated."""

import jax
from jax.sharding import Mesh

from dalle2_jax.training.sharding import batch_sharding, replicated
from dalle2_jax.types import Array


def place(images: Array, mesh: Mesh) -> jax.Array:
    """Copies a batch to the devices, divided over them; whole to each if their number does not divide its size."""
    divides = len(images) % mesh.size == 0
    return jax.device_put(images, batch_sharding(mesh) if divides else replicated(mesh))
