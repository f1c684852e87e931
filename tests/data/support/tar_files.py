"""Writes tar shards in the layout of img2dataset."""

import io
import json
import tarfile

import cv2
import numpy as np


def png(level, shape=(10, 12, 3)):
    return cv2.imencode(".png", np.full(shape, level, np.uint8))[1].tobytes()


def members(numbers, **fields):
    """Yields the tar members of img2dataset's records: (name, content) of image, caption and JSON metadata."""
    for number in numbers:
        metadata = {"key": f"{number:09d}", "number": number, **fields}
        yield f"{number:09d}.png", png(number % 256)
        yield f"{number:09d}.txt", f"caption {number}".encode()
        yield f"{number:09d}.json", json.dumps(metadata).encode()


def tar(path, entries, format=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as file:
        for name, content in entries:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def levels(source):
    """Returns the gray level of each image, which identifies the record."""
    return source.fetch(range(len(source)))["image"][:, 0, 0, 0].tolist()
