"""A small real data set without a download: scikit-learn's 1,797 scans of handwritten digits.

The scans (Alpaydin and Kaynak, UCI optdigits, 1998) are 8x8 pixels of 17 levels, bright ink on black. They are
written at 32x32 by cubic splines, so that common image operations such as blur and crop work. About 15 %
are ``val``, by a checksum of the scan's number, so the split never changes.
"""

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Int, UInt8
from sklearn.datasets import load_digits
from tqdm import tqdm

from dalle2_jax import lock
from dalle2_jax.data.formats.folder_index import METADATA
from dalle2_jax.errors import UserError

SIDE = 32
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_VAL_PERCENT = 15
_CAPTIONS = (
    "a handwritten {name}",
    "the digit {label} written by hand",
    "a scan of a handwritten {label}",
    "the number {name}, handwritten",
    "handwritten digit {name}",
    "a picture of the digit {name}",
)


@dataclass(frozen=True)
class Digits:
    """Scans as images, and the digit that each shows."""

    images: UInt8[np.ndarray, "B 32 32 3"]
    labels: Int[np.ndarray, "B"]


def captions_of(label: int) -> tuple[str, ...]:
    """Returns every caption of a digit, 0 to 9."""
    return tuple(caption.format(name=NAMES[label], label=label) for caption in _CAPTIONS)


def label_of(caption: str) -> int | None:
    """Returns the digit whose caption this is, or None."""
    return next((label for label in range(10) if caption in captions_of(label)), None)


def load(split: str) -> Digits:
    """Returns the scans of ``train`` or ``val``, in order.

    Raises:
        UserError: on any other split.
    """
    if split not in ("train", "val"):
        raise UserError(f"digits has no split {split!r}: choose train or val")
    scans: Any = load_digits()  # a Bunch
    chosen = [number for number in range(len(scans.target)) if _is_val(number) == (split == "val")]
    return Digits(np.stack([_image(scans.images[number]) for number in chosen]), scans.target[chosen])


def write(out: str | Path) -> None:
    """Writes ``out/train`` and ``out/val`` as PNG with captions in metadata.jsonl, for `FolderSource`.

    The folder appears under its name only when it is complete.

    Raises:
        UserError: when ``out`` exists and is not an empty folder.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: name a new one")
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock.unfinished(out.parent, f".{out.name}.") as folder:
        for split in ("train", "val"):
            _write_split(folder / split, load(split))
        os.replace(folder, out)


def _is_val(number: int) -> bool:
    return zlib.crc32(str(number).encode()) % 100 < _VAL_PERCENT


def _image(scan: np.ndarray) -> np.ndarray:
    """Scales a scan of levels 0..16 to ``uint8[32, 32, 3]``."""
    smooth = cv2.resize(scan.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    gray = np.rint(np.clip(smooth * (255 / 16), 0, 255)).astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2)


def _write_split(folder: Path, digits: Digits) -> None:
    folder.mkdir()
    with (folder / METADATA).open("w") as metadata:
        pairs = zip(digits.images, digits.labels, strict=True)
        for number, (image, label) in enumerate(tqdm(pairs, folder.name, len(digits.labels), leave=False)):
            name = f"{number:04d}.png"
            if not cv2.imwrite(str(folder / name), image):
                raise OSError(f"cannot write {folder / name}")
            metadata.write(json.dumps({"file_name": name, "text": captions_of(int(label))}) + "\n")
