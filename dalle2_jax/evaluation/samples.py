"""Generated images on disk, in shards that survive an interruption, and their features.

A folder of samples has

    settings.json           what the images depend on: weights, seed, sampling settings, batch size
    00000.npy               uint8[B, H, W, 3], the images of the first B captions; the last shard may have fewer
    00000.json              their captions
    NETWORK-HASH/00000.npy  float32[B, D], their features

A shard is one batch of the sampler. All batches have one size, the last one padded, so that an image does not depend on
where a run was interrupted, nor on how many captions follow.
"""

import concurrent.futures
import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from jaxtyping import Float32, UInt8

from dalle2_jax import lock
from dalle2_jax.errors import ConfigError, DataError, shown
from dalle2_jax.evaluation.features import FeatureNetwork, extract
from dalle2_jax.files import write_array, write_atomically
from dalle2_jax.reading import parse_json, read_bytes

SETTINGS = "settings.json"
_MAX_JSON, _HEADER = 2**24, 4096
"""Maximum bytes of a JSON file, and of the header of a .npy file."""

Generate = Callable[[int, Sequence[str]], UInt8[np.ndarray, "B H W 3"]]
"""(number of the first caption, B captions) -> their images."""


class SampleFolder:
    """A folder of generated images.

    Args:
      path: the folder, in a folder that this process has locked; it is made if needed.
      settings: what the images depend on, as JSON types.
      batch_size: images of a shard.
      size: height and width of the images, in pixels.

    Raises:
      ConfigError: the folder has images of other settings; ``field`` names the first that differs.
      DataError: its settings cannot be read.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], batch_size: int, size: int):
        self.path, self.batch_size, self.size = path, batch_size, size
        self.captions: list[str] = []
        for folder in (path, *path.glob("*/")):
            lock.sweep(folder)
        settings = json.loads(json.dumps({**settings, "batch_size": batch_size}))
        stored = read_settings(path)
        if stored is None:
            write_atomically(path / SETTINGS, json.dumps(settings, indent=2) + "\n")
        elif (field := difference(stored, settings)) is not None:
            values = (shown(at(each, field)) for each in (stored, settings))
            raise ConfigError(
                "{} holds samples with {} {}, not {}: give the same, or another --out".format(path, field, *values),
                field,
            )

    def __len__(self) -> int:
        return len(self.captions)

    def fill(
        self,
        captions: Sequence[str],
        generate: Generate,
        networks: Sequence[FeatureNetwork] = (),
        progress: bool = False,
    ) -> None:
        """Generates the images of captions that are not there yet, and the features of all of them.

        Features of a shard are computed by another thread, while the next shard is generated.

        Args:
          captions: of all images.
          generate: makes a batch of images.
          networks: those whose features are computed.
          progress: whether a progress bar is shown.

        Raises:
          ConfigError: a shard has other captions, of field "data".
        """
        self.captions = list(captions)
        starts = range(0, len(captions), self.batch_size)
        bar = tqdm.tqdm(total=len(captions), desc="sampling", unit="image", disable=not progress)
        with bar, _one_thread() as thread:
            jobs: list[concurrent.futures.Future[None]] = []
            for number, start in enumerate(starts):
                expected = self.captions[start : start + self.batch_size]
                if not self._holds(number, expected):
                    padded = [expected[place % len(expected)] for place in range(self.batch_size)]
                    self._write(number, expected, generate(start, padded)[: len(expected)])
                jobs += [thread.submit(self._store_features, number, network) for network in networks]
                for job in (job for job in jobs if job.done()):
                    job.result()  # raises what the job has raised
                bar.update(len(expected))
            for job in jobs:
                job.result()

    def images(self, count: int | None = None) -> UInt8[np.ndarray, "N H W 3"]:
        """Returns the first images, all by default."""
        count = len(self) if count is None else count
        return np.concatenate([*self._shards(count)])

    def features(self, network: FeatureNetwork, count: int | None = None) -> Float32[np.ndarray, "N D"]:
        """Returns the features of the first images, all by default; those that are not there yet are computed."""
        count = len(self) if count is None else count
        shards = [self._extract(number, network) for number in range(-(-count // self.batch_size))]
        return np.concatenate(shards)[:count]

    # --- shards -----------------------------------------------------------------------------------

    def _shards(self, count: int) -> Iterator[np.ndarray]:
        for number in range(-(-count // self.batch_size)):
            yield self._read(number)[: count - number * self.batch_size]

    def _holds(self, number: int, expected: Sequence[str]) -> bool:
        """Whether a shard has the images of some captions. ConfigError if they are of others."""
        path = self.path / f"{number:05d}.json"
        if not path.is_file() or not path.with_suffix(".npy").is_file():
            return False
        stored = _read_json(path)
        if not isinstance(stored, list):
            raise _damaged(path, "it is no list of captions")
        common = min(len(stored), len(expected))
        if stored[:common] != expected[:common]:
            raise ConfigError(f"{path} has other captions than the data: give the same data, or another --out", "data")
        return len(stored) >= len(expected)

    def _write(self, number: int, captions: Sequence[str], images: np.ndarray) -> None:
        write_array(self.path / f"{number:05d}.npy", images)
        write_atomically(self.path / f"{number:05d}.json", json.dumps(captions))

    def _read(self, number: int) -> UInt8[np.ndarray, "B H W 3"]:
        path = self.path / f"{number:05d}.npy"
        images = read_array(path, self.batch_size * self.size**2 * 3)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (self.size, self.size, 3):
            raise _damaged(path, f"it has {images.dtype}{list(images.shape)}, not images of {self.size} pixels")
        return images

    def _store_features(self, number: int, network: FeatureNetwork) -> None:
        self._extract(number, network)

    def _extract(self, number: int, network: FeatureNetwork) -> Float32[np.ndarray, "B D"]:
        """Returns the features of a shard, from disk or computed and written."""
        path = self.path / folder_name(network) / f"{number:05d}.npy"
        images = self._read(number)
        if path.is_file():
            stored = read_array(path, self.batch_size * network.dims * 4)
            if stored.dtype == np.float32 and stored.shape == (len(images), network.dims):
                return stored
        found = extract(network, images, self.batch_size)
        write_array(path, found)
        return found


@contextlib.contextmanager
def _one_thread() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    """Yields a pool of one thread; if the block fails, jobs that have not begun are dropped."""
    pool = concurrent.futures.ThreadPoolExecutor(1, "features")
    try:
        yield pool
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


# --- settings -------------------------------------------------------------------------------------


def read_settings(path: Path) -> dict[str, Any] | None:
    """Returns the settings of a folder of samples; None if it has none.

    Raises:
      DataError: they cannot be read.
    """
    file = path / SETTINGS
    if not file.is_file():
        return None
    stored = _read_json(file)
    if not isinstance(stored, dict):
        raise _damaged(file, "it is no JSON object")
    return stored


def difference(stored: Any, given: Any, field: str = "") -> str | None:
    """Returns the path of the first field in which two JSON values differ, as in "sampling.decoder.guidance"."""
    if not (isinstance(stored, Mapping) and isinstance(given, Mapping)):
        return None if stored == given else field
    for name in {**given, **stored}:
        inner = f"{field}.{name}" if field else name
        if name not in stored or name not in given:
            return inner
        if (found := difference(stored[name], given[name], inner)) is not None:
            return found
    return None


def at(settings: Mapping[str, Any], field: str) -> Any:
    """Returns the value of a field by its path; None if there is none."""
    value: Any = settings
    for name in field.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def folder_name(network: FeatureNetwork) -> str:
    """Returns the name of the folder of a network's features; its fingerprint comes from a file and may be any text."""
    return re.sub(r"[^\w-]", "_", f"{network.name}-{network.fingerprint}", flags=re.ASCII)[:100]


# --- files ----------------------------------------------------------------------------------------


def read_array(path: Path, content: int) -> np.ndarray:
    """Returns the array of a .npy file, without pickles.

    Args:
      path: of the file.
      content: maximum bytes of the array.

    Raises:
      DataError: the file is damaged or larger.
    """
    try:
        return np.load(io.BytesIO(read_bytes(path, content + _HEADER)), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from error


def _read_json(path: Path) -> Any:
    try:
        return parse_json(read_bytes(path, _MAX_JSON))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path} is damaged ({shown(why)}): remove it and run the same command again", path)
