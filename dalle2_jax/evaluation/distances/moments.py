"""Mean and covariance of features, computed from a stream, and the small file that holds them.

    moments = Moments()
    for batch in batches:
        moments.update(features.extract(network, batch))
    statistics = moments.statistics(Origin(network.name, network.fingerprint, data="COCO val"))
    statistics.save("coco.npz")

The file is an .npz without compression, of 32 MiB for 2,048 features. Its arrays ``mu`` and ``sigma`` are named as
pytorch-fid reads them; ``description`` is JSON.
"""

import dataclasses
import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64

from dalle2_jax.data.storage.arrays import BYTES, Kind, unpack_arrays
from dalle2_jax.errors import DataError, printable, shown
from dalle2_jax.evaluation.distances import blocks
from dalle2_jax.files import written_atomically
from dalle2_jax.reading import parse_json, read_bytes

MAX_DIM = 16_384
"""Maximum number of features in a file of statistics, whose covariance then has 2 GiB."""

_MEAN, _COVARIANCE, _DESCRIPTION = "mu", "sigma", "description"
_KINDS = {_MEAN: Kind(np.float64, (None,)), _COVARIANCE: Kind(np.float64, (None, None)), _DESCRIPTION: BYTES}
_MAX_DESCRIPTION = 10_000


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where features come from. Statistics compare if all but ``data`` are equal.

    Attributes:
      network: name of the feature network, as in "inception".
      fingerprint: hash of the network's weights.
      preparation: how images were prepared before the network, as in "center crop, 256x256".
      data: name or digest of the data set.
    """

    network: str = ""
    fingerprint: str = ""
    preparation: str = ""
    data: str = ""

    def check_same(self, other: "Origin", path: Path | None = None) -> None:
        """Checks that features of another data set are comparable.

        Args:
          other: their origin.
          path: the file with this origin, for the message.

        Raises:
          DataError: the network, its weights or the preparation differ; the message names the field.
        """
        where = "one set of statistics" if path is None else str(path)
        for field in ("network", "fingerprint", "preparation"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise DataError(
                    f"statistics are not comparable: {field} is {shown(mine)} in {where}, and {shown(theirs)} for the "
                    "other images. Compute both with one network and preparation.",
                    path,
                )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Statistics:
    """Mean and covariance of the features of a data set.

    Attributes:
      mean: float64[D].
      covariance: float64[D, D], with divisor n - 1.
      n: number of images.
      origin: where the features come from.
    """

    mean: Float64[np.ndarray, "D"]
    covariance: Float64[np.ndarray, "D D"]
    n: int
    origin: Origin = Origin()

    def __repr__(self) -> str:
        return f"Statistics({self.dim} features of {self.n} images, {self.origin})"

    @property
    def dim(self) -> int:
        """The number of features D."""
        return len(self.mean)

    @classmethod
    def of(cls, features: Float[np.ndarray, "N D"], origin: Origin = Origin()) -> "Statistics":
        """Returns the statistics of features that are in memory.

        Args:
          features: of at least two images.
          origin: where the features come from.

        Raises:
          DataError: as `Moments.update` and `Moments.statistics`.
        """
        moments = Moments()
        moments.update(features)
        return moments.statistics(origin)

    def check_same(self, other: "Statistics") -> None:
        """Checks that statistics of another data set are comparable.

        Raises:
          DataError: as `Origin.check_same`, or the numbers of features differ.
        """
        self.origin.check_same(other.origin)
        if self.dim != other.dim:
            raise DataError(f"statistics are not comparable: one has {self.dim} features, the other {other.dim}")

    def save(self, path: str | Path) -> None:
        """Writes the file, complete or not at all.

        Raises:
          OSError: it cannot be written.
        """
        description = json.dumps({"n": self.n, **dataclasses.asdict(self.origin)}).encode()
        arrays = {_MEAN: self.mean, _COVARIANCE: self.covariance, _DESCRIPTION: np.frombuffer(description, np.uint8)}
        with written_atomically(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                member = io.BytesIO()
                np.save(member, np.ascontiguousarray(array), allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getbuffer())  # without a date: the same bytes

    @classmethod
    def load(cls, path: str | Path, origin: Origin | None = None) -> "Statistics":
        """Reads a file that `save` wrote. Nothing is unpickled or expanded.

        Args:
          path: of the file.
          origin: of the features that are to be compared with it; None for any.

        Raises:
          DataError: there is no such file, it is damaged, it is not such a file, or its origin is not comparable.
        """
        path = Path(path)
        try:
            content = read_bytes(path, 8 * MAX_DIM * (MAX_DIM + 2))
            arrays = unpack_arrays(content, _KINDS, limit=len(content))
            n, found = _description(arrays[_DESCRIPTION].tobytes())
            mean, covariance = arrays[_MEAN].copy(), arrays[_COVARIANCE].copy()
            if not len(mean) or covariance.shape != (len(mean), len(mean)):
                raise ValueError(f"a mean of {len(mean)} and a covariance of {covariance.shape}")
            if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
                raise ValueError("NaN or infinity")
        except FileNotFoundError:
            raise DataError(f"there is no file {path}", path) from None
        except (OSError, ValueError) as error:
            reason = printable(error)[:200]
            raise DataError(f"{path} holds no statistics of features, or is damaged ({reason})", path) from error
        if origin is not None:
            found.check_same(origin, path)
        return cls(mean, covariance, n, found)


def _description(content: bytes) -> tuple[int, Origin]:
    """Returns n and the origin. ValueError if one is missing or of another type."""
    found = parse_json(content[:_MAX_DESCRIPTION])
    if not isinstance(found, dict):
        raise ValueError(f"the description is {shown(found)}")
    n, texts = found.get("n"), [found.get(field.name) for field in dataclasses.fields(Origin)]
    if type(n) is not int or n < 2 or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"the description is {shown(found)}")
    return n, Origin(*map(str, texts))


class Moments:
    """Accumulates mean and covariance of features batch by batch (Chan, Golub & LeVeque 1979).

    Holds one matrix [D, D] and no features. The error is that of float64 for features far from zero too.
    """

    def __init__(self) -> None:
        self._n = 0
        self._mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))

    def update(self, features: Float[np.ndarray, "B D"]) -> None:
        """Adds the features of a batch of images.

        Raises:
          DataError: they are no matrix, have NaN or infinity, or another number of columns than those before.
        """
        values = blocks.checked(features, at_least=0)
        if not self._n:
            self._mean, self._scatter = np.zeros(values.shape[1]), np.zeros((values.shape[1],) * 2)
        if values.shape[1] != len(self._mean):
            raise DataError(f"a batch has {values.shape[1]} features an image, those before {len(self._mean)}")
        for _, block in blocks.rows(values):
            self._add(block)

    def _add(self, block: Float64[np.ndarray, "B D"]) -> None:
        total = self._n + len(block)
        mean = block.mean(axis=0)
        shift = mean - self._mean
        # The rank-one term n m / (n + m) shift shift^T is a further row of the centred block.
        between = math.sqrt(self._n * len(block) / total) * shift
        centred = np.concatenate([block - mean, between[None]])
        self._scatter += centred.T @ centred
        self._mean = self._mean + shift * (len(block) / total)
        self._n = total

    def statistics(self, origin: Origin = Origin()) -> Statistics:
        """Returns the mean and covariance of all features so far.

        Args:
          origin: where the features come from.

        Raises:
          DataError: there were fewer than two images.
        """
        if self._n < 2:
            raise DataError(f"a covariance needs at least 2 images, got {self._n}")
        return Statistics(self._mean.copy(), self._scatter / (self._n - 1), self._n, origin)
