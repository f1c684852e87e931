"""Principal components of a system's image embeddings (Ramesh et al. 2022, section 3, figure 7).

With the mean m of the embeddings and the leading eigenvectors U_k of their covariance, an embedding's projection on k
components is

    z_k = m + U_k U_k^T (z - m)                                                                (1)

They are measured once (``dalle2 evaluate SYSTEM --measures components``) and stored with the system's CLIP.
"""

import base64
import binascii
import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from dalle2_jax.errors import ConfigError, UserError, shown
from dalle2_jax.workdir.folder import StageFolder

FILE = "components.json"
"""File of a CLIP with the principal components of its image embeddings."""

_RANK = 1e-10
"""Variance relative to the largest, below which a component is rounding error."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Components:
    """The principal components of image embeddings.

    Attributes:
      mean: m.
      variances: the eigenvalues of the covariance, the largest first.
      basis: the eigenvectors as columns, in this order.
      n: number of embeddings that they were measured on.
    """

    mean: Float32[np.ndarray, "E"]
    variances: Float32[np.ndarray, "E"]
    basis: Float32[np.ndarray, "E E"]
    n: int

    @classmethod
    def of(cls, mean: Float[np.ndarray, "E"], covariance: Float[np.ndarray, "E E"], n: int) -> "Components":
        """Returns the components of embeddings with a mean and a covariance, computed in float64."""
        variances, vectors = np.linalg.eigh(covariance.astype(np.float64))  # by increasing eigenvalue
        vectors = np.ascontiguousarray(vectors[:, ::-1], np.float32)
        return cls(mean.astype(np.float32), np.maximum(variances[::-1], 0.0).astype(np.float32), vectors, n)

    @property
    def rank(self) -> int:
        """Number of components whose variance is not zero."""
        return int((self.variances > _RANK * self.variances[0]).sum())

    def needed(self, share: float) -> int:
        """Returns the least number of components that retain a share of the variance."""
        retained = np.cumsum(self.variances.astype(np.float64))
        return int(np.searchsorted(retained, share * retained[-1] * (1 - 1e-12))) + 1

    def project(self, emb: Float[np.ndarray, "N E"], count: int) -> Float32[np.ndarray, "N E"]:
        """Returns the projections of embeddings on the first ``count`` components, eq. (1).

        Raises:
          ConfigError: ``count`` is not from 1 to the rank.
        """
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= self.rank:
            raise ConfigError(
                f"components must be integers from 1 to {self.rank}, the rank of the embeddings of {self.n} images, "
                f"got {shown(count)}",
                "components",
            )
        leading = self.basis[:, :count]
        return self.mean[None] + ((emb - self.mean[None]) @ leading) @ leading.T

    def write(self, folder: StageFolder, step: int) -> None:
        """Stores the components in the folder of a CLIP, whose checkpoint ``step`` they were measured on."""
        arrays = {name: getattr(self, name) for name in ("mean", "variances", "basis")}
        encoded = {name: base64.b64encode(array.astype("<f4").tobytes()).decode() for name, array in arrays.items()}
        folder.write_json(FILE, {"step": step, "n": self.n, **encoded})

    @classmethod
    def read(cls, folder: StageFolder, step: int, dim: int) -> "Components":
        """Returns the components that are stored in the folder of a CLIP.

        Args:
          folder: of the CLIP.
          step: of the loaded checkpoint.
          dim: dimensions of its embeddings.

        Raises:
          UserError: there are none, they are those of another checkpoint, or the file is damaged.
        """
        how = f"measure them with `dalle2 evaluate {folder.root} --measures components`"
        stored = folder.read_json(FILE)
        if stored is None:
            raise UserError(f"{folder.path} has no principal components of its image embeddings: {how}")
        if stored.get("step") != step:
            raise UserError(f"{folder.path / FILE} is of step {stored.get('step')}, and step {step} is loaded: {how}")
        try:
            mean, variances, basis = (_decoded(stored[name]) for name in ("mean", "variances", "basis"))
            return cls(mean.reshape(dim), variances.reshape(dim), basis.reshape(dim, dim), int(stored["n"]))
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise UserError(f"{folder.path / FILE} is damaged ({type(error).__name__}): {how}") from error


def _decoded(text: Any) -> Float32[np.ndarray, "..."]:
    """Returns float32 numbers of base64. ValueError if they are not finite."""
    numbers = np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)
    if not np.isfinite(numbers).all():
        raise ValueError("NaN or infinity")
    return numbers
