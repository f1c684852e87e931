"""Any folder of pictures with captions.

Captions come from ``metadata.jsonl`` beside the pictures (the Hugging Face imagefolder convention, one object
a line: ``{"file_name": "a/b.png", "text": "a caption"}``, where ``text`` may be a list of captions), or else from
a ``.txt`` file beside each picture, one caption a line. A folder may be divided into sub-folders ``train``, ``val``
and so on; an undivided folder is all ``train``.

A picture that cannot be read does not stop a run: the next readable one takes its place, and
`FolderSource.rejected` counts the pictures refused, by cause.
"""

import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dalle2_jax.data import images
from dalle2_jax.types import UserError

METADATA = "metadata.jsonl"
_DIVISIONS = ("train", "val", "validation", "test")


class FolderSource:
    """Random access to the pictures of a folder, fitted and cropped to ``uint8[resolution, resolution, 3]``.

    Args:
        path: the folder; if it has a sub-folder named ``split``, that is read.
        split: ``train``, or the name of a sub-folder.
        resolution: side of the pictures; a picture's shorter side is scaled to it, then the longer is cropped.
        crop: ``center``, or ``random`` for another crop at each `draw`.

    Raises:
        UserError: when the folder, the split, the pictures or a caption is missing, or a line of metadata is broken.
    """

    def __init__(self, path: str | Path, split: str = "train", resolution: int = 64, crop: str = "center") -> None:
        if crop not in images.CROPS:
            raise UserError(f"crop {crop!r} is not one of {', '.join(images.CROPS)}")
        if resolution < 1:
            raise UserError(f"resolution must be at least 1, not {resolution}")
        self.path, self.split, self.resolution, self.crop = Path(path), split, resolution, crop
        folder = _division(self.path, split)
        pictures = _pictures(folder)
        metadata = folder / METADATA
        self._refused: dict[str, str] = {}  # picture to cause
        if metadata.is_file():
            captioned = _read_metadata(metadata)
            self._refused |= {name: "missing" for name in captioned.keys() - pictures}
            captioned = {name: text for name, text in captioned.items() if name in pictures}
        else:
            captioned = _read_sidecars(folder, sorted(pictures))
        if not captioned:
            raise UserError(f"{metadata} names no picture that is in {folder}: file_name is relative to {folder}")
        self._folder = folder
        self._examples = tuple(captioned.items())

    def __len__(self) -> int:
        return len(self._examples)

    def __repr__(self) -> str:
        return f"FolderSource({str(self.path)!r}, {self.split!r}, {self.resolution}, {self.crop!r})"

    @property
    def rejected(self) -> Counter[str]:
        """How many pictures this process refused so far: ``missing``, ``unreadable`` or ``not a picture``."""
        return Counter(self._refused.values())

    def __getitem__(self, index: int) -> dict:
        """Returns ``{"image", "captions", "caption"}``, with the centre crop whatever ``crop`` is.

        Raises:
            UserError: when not one picture of the folder can be read.
        """
        picture, name, captions = self._readable(index)
        return {
            "image": images.crop(picture, self.resolution),
            "captions": captions,
            "caption": captions[zlib.crc32(name.encode()) % len(captions)],
        }

    def draw(self, index: int, rng: np.random.Generator) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
        """Returns the picture, cropped as ``crop`` says, and one of its captions drawn with ``rng``.

        Raises:
            UserError: when not one picture of the folder can be read.
        """
        picture, _, captions = self._readable(index)
        image = images.crop(picture, self.resolution, rng if self.crop == "random" else None)
        return image, captions[rng.integers(len(captions))]

    def captions(self, limit: int) -> Iterator[str]:
        """Yields every caption of the first ``limit`` pictures."""
        for _, captions in self._examples[:limit]:
            yield from captions

    def _readable(self, index: int) -> tuple[np.ndarray, str, tuple[str, ...]]:
        """Returns the fitted picture ``index``, or of the next that can be read, its name and its captions."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        for offset in range(len(self)):
            name, captions = self._examples[(index + offset) % len(self)]
            if name in self._refused:
                continue
            try:
                picture = images.decode((self._folder / name).read_bytes())
                return images.fit(picture, self.resolution), name, captions
            except OSError:
                self._refused[name] = "unreadable"
            except ValueError:
                self._refused[name] = "not a picture"
        causes = ", ".join(f"{count} {cause}" for cause, count in self.rejected.items())
        raise UserError(f"not one picture in {self._folder} can be read ({causes})")


def _division(path: Path, split: str) -> Path:
    """The folder of a split: ``path/split``, or ``path`` itself for the train split of an undivided folder."""
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    if (path / split).is_dir():
        return path / split
    divisions = [name for name in _DIVISIONS if (path / name).is_dir()]
    if split == "train" and not divisions:
        return path
    found = f"it has {', '.join(divisions)}" if divisions else "it is undivided, so all of it is train"
    raise UserError(f"{path} has no sub-folder {split!r} ({found}): make {path / split} with its own captions")


def _pictures(folder: Path) -> set[str]:
    """Names of the picture files below ``folder``, relative to it, with forward slashes."""
    found = set()
    for root, directories, files in os.walk(folder):
        directories[:] = [name for name in directories if not name.startswith(".")]
        relative = Path(root).relative_to(folder)
        found.update(
            (relative / name).as_posix()
            for name in files
            if Path(name).suffix.lower() in images.SUFFIXES and not name.startswith(".")
        )
    if not found:
        raise UserError(f"there are no pictures in {folder} ({', '.join(sorted(images.SUFFIXES))})")
    return found


def _read_metadata(path: Path) -> dict[str, tuple[str, ...]]:
    """Returns captions by file name; a file named twice has the captions of both lines."""
    captioned: dict[str, tuple[str, ...]] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                name, captions = _parse(json.loads(line))
            except (ValueError, TypeError) as error:
                reason = "not UTF-8 JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else error
                raise UserError(f"{path}:{number}: {reason}") from None
            captioned[name] = captioned.get(name, ()) + captions
    return captioned


def _parse(record: object) -> tuple[str, tuple[str, ...]]:
    if not isinstance(record, dict):
        raise TypeError("expected an object with file_name and text")
    for field in ("file_name", "text"):
        if field not in record:
            raise ValueError(f"{field} is missing")
    name, text = record["file_name"], record["text"]
    captions = tuple(text) if isinstance(text, list) else (text,)
    if not isinstance(name, str) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise TypeError("file_name must be a string, and text a string or a list of strings")
    return Path(name).as_posix(), captions


def _read_sidecars(folder: Path, names: list[str]) -> dict[str, tuple[str, ...]]:
    """Returns captions by file name from the .txt beside each picture; an empty file is the empty caption."""
    captioned, missing = {}, []
    for name in names:
        path = (folder / name).with_suffix(".txt")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            missing.append(name)
            continue
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text") from None
        captioned[name] = tuple(line.strip() for line in lines if line.strip()) or ("",)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} pictures in {folder} have no caption, the first {missing[0]}: "
            f"write {Path(missing[0]).with_suffix('.txt')} or a {METADATA}"
        )
    return captioned
