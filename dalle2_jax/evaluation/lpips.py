"""LPIPS, a perceptual distance between two images (Zhang et al. 2018), version 0.1.

    distance = lpips.load("runs/lpips")
    print(distance(images, others))  # float32[B]

``dalle2 weights import`` makes the folder of published files: AlexNet's, the default of the literature, or VGG16's.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh
from jaxtyping import Float, Float32, UInt8

from dalle2_jax import compilation
from dalle2_jax.errors import DataError, UserError
from dalle2_jax.evaluation.features.extract import batched, checked
from dalle2_jax.evaluation.features.loading import missing
from dalle2_jax.evaluation.features.placement import place
from dalle2_jax.training.sharding import MeshConfig, make_mesh, replicated
from dalle2_jax.types import Array, Params
from dalle2_jax.weights.features import folder
from dalle2_jax.weights.features.table import NETWORKS

NETWORK_KINDS = {"lpips_alexnet": 31, "lpips_vgg16": 16}
"""Names of stored networks -> the smallest side of images, in pixels."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Lpips:
    """LPIPS over one network. Images are uint8 RGB, are not resized, and must have one size.

    Attributes:
      name: "lpips_alexnet" or "lpips_vgg16".
      min_size: smallest side of images, in pixels.
      fingerprint: hash of the weights, for caches.
      encode: uint8[B, H, W, 3] -> float32[B, D], jitted; see `embed`.
      compare: two batches uint8[B, H, W, 3] -> float32[B], jitted.
      devices: number of devices that a batch is divided over.
    """

    name: str
    min_size: int
    fingerprint: str
    encode: Callable[[Array], Array]
    compare: Callable[[Array, Array], Array]
    devices: int = 1

    def __repr__(self) -> str:
        return f"Lpips({self.name}, weights {self.fingerprint})"

    def __call__(self, images: UInt8[Array, "B H W 3"], others: UInt8[Array, "B H W 3"]) -> Float32[np.ndarray, "B"]:
        """Returns the distance of each image to the other image of the same index.

        Raises:
          DataError: the images differ in number or size, or are not uint8 RGB images.
        """
        pair = [np.stack(list(checked(each, self.min_size))) for each in (images, others)]
        if pair[0].shape != pair[1].shape:
            raise DataError(f"LPIPS compares images of equal sizes, got {pair[0].shape} and {pair[1].shape}")
        return np.asarray(self.compare(*pair))

    def embed(
        self, images: UInt8[np.ndarray, "N H W 3"] | list[np.ndarray], batch_size: int = 16, progress: bool = False
    ) -> Float32[np.ndarray, "N D"]:
        """Returns embeddings whose squared Euclidean distances are LPIPS distances, for `distances`.

        D is 31,872 for AlexNet and 499,712 for VGG16 at 64x64 pixels, and grows with the area.

        Args:
          images: images of one size.
          batch_size: images at a time, rounded up to a multiple of the devices.
          progress: whether to show a progress bar.

        Raises:
          DataError: as `features.extract`.
        """
        size = -(-batch_size // self.devices) * self.devices
        title = f"{self.name} embeddings"
        with tqdm.tqdm(total=len(images), desc=title, unit="image", leave=False, disable=not progress) as bar:
            return batched(self.encode, checked(images, self.min_size), size, bar)


def distances(
    embeddings: Float[np.ndarray, "N D"], others: Float[np.ndarray, "M D"], block: int = 1024
) -> Float32[np.ndarray, "N M"]:
    """Returns the LPIPS distance of each image to each other image, from their embeddings.

    The error is about 1e-6, from cancellation; `Lpips.__call__` is exact.

    Args:
      embeddings: as `Lpips.embed` returns them.
      others: as ``embeddings``.
      block: rows that are computed at a time.
    """
    columns = _squared_norms(others)
    result = np.empty((len(embeddings), len(others)), np.float32)
    for start in range(0, len(embeddings), block):
        rows = embeddings[start : start + block]
        cross = np.asarray(jnp.matmul(rows, others.T, precision="highest"))
        result[start : start + block] = np.maximum(_squared_norms(rows)[:, None] + columns[None] - 2 * cross, 0.0)
    return result


def _squared_norms(rows: Float[np.ndarray, "N D"]) -> Float32[np.ndarray, "N"]:
    return np.einsum("nd,nd->n", rows, rows, dtype=np.float32)


def load(path: str | os.PathLike[str]) -> Lpips:
    """Loads LPIPS from a folder that ``dalle2 weights import`` wrote, on all devices.

    Raises:
      UserError: there is none; the message has the command that imports it.
    """
    root = Path(path).expanduser()
    if not folder.holds_network(root):
        raise UserError(missing(root))
    stored = folder.read(root)
    if stored.name not in NETWORK_KINDS:
        raise UserError(f"{root} holds {stored.name}, without the heads of LPIPS: import them together with it")
    compilation.enable_compilation_cache()
    return make_lpips(stored.name, stored.variables, stored.fingerprint, make_mesh(MeshConfig()))


def make_lpips(name: str, variables: Params, fingerprint: str, mesh: Mesh) -> Lpips:
    """Returns LPIPS.

    Args:
      name: a key of `NETWORK_KINDS`.
      variables: its arrays.
      fingerprint: hash of the arrays.
      mesh: the devices.
    """
    module: Any = NETWORKS[name].module
    placed = jax.device_put(variables, replicated(mesh))

    def embed(variables: Params, images: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return module.apply(variables, images.astype(jnp.float32) / 127.5 - 1.0)

    def compare(variables: Params, images: jax.Array, others: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(embed(variables, images) - embed(variables, others)), axis=1)

    encode, distance = jax.jit(embed), jax.jit(compare)
    return Lpips(
        name=name,
        min_size=NETWORK_KINDS[name],
        fingerprint=fingerprint,
        encode=lambda images: encode(placed, place(images, mesh)),
        compare=lambda images, others: distance(placed, place(images, mesh), place(others, mesh)),
        devices=mesh.size,
    )
