"""Writes a data set in another format: ArrayRecord, as TFDS prepares it, or tar shards as img2dataset makes them.

Pictures keep the bytes of their files; those that are drawn become PNG. Records that cannot be used are left out. What
is written appears under its name when it is complete.
"""

import contextlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from dalle2_jax.data.pictures import PictureSource
from dalle2_jax.data.records import Rejected
from dalle2_jax.data.sources import Source
from dalle2_jax.data.tfds import FIELDS
from dalle2_jax.types import UserError

SHARD_SIZE = 10_000
"""Pictures a tar shard."""

NAME = "captioned_pictures"
"""Of the data set that is written as ArrayRecord, and its folder."""

_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


class Written(NamedTuple):
    """A record as it is written: a picture file's bytes and its ending, and what is said of it."""

    key: str
    image: bytes
    suffix: str
    captions: tuple[str, ...]
    fields: Mapping[str, Any]


def convert(sources: Mapping[str, Source], out: Path, form: str) -> dict[str, int]:
    """Writes splits of a data set and returns how many pictures each has.

    Args:
        sources: the splits, by name.
        out: the folder, which must not exist or be empty.
        form: one of ``FORMATS``.

    Raises:
        UserError: ``out`` holds something, or a split has no picture that can be used.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: name a new one")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        counts = FORMATS[form](sources, unfinished)
        unfinished.chmod(0o755)
        os.replace(unfinished, out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return counts


def records_of(source: Source, split: str) -> Iterator[Written]:
    """Yields what is written of a source. UserError if it is nothing."""
    count = 0
    for index in tqdm(range(len(source)), desc=split, unit="picture"):
        try:
            record = _stored(source, index) if isinstance(source, PictureSource) else _drawn(source, index)
        except Rejected:
            continue
        count += 1
        yield record
    if not count:
        raise UserError(f"not one picture of {source} can be written")


def _stored(source: PictureSource, index: int) -> Written:
    record = source.records.read(index)
    if not record.captions:
        raise Rejected("no caption")
    if record.image is None:
        raise Rejected("no picture")
    content = _png(record.image) if isinstance(record.image, np.ndarray) else record.image
    try:
        with Image.open(io.BytesIO(content)) as file:
            suffix = _SUFFIXES[file.format]
    except Exception:
        raise Rejected("not a picture") from None  # whatever a parser says of bytes from the world
    return Written(record.key, content, suffix, record.captions, record.fields)


def _drawn(source: Source, index: int) -> Written:
    example = source[index]
    return Written(f"{index:08d}", _png(example["image"]), "png", example["captions"], {})


def _png(picture: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()


def _write_tars(sources: Mapping[str, Source], out: Path) -> dict[str, int]:
    """Writes SPLIT/00000.tar ..: of each picture KEY.png (or .jpg ..), KEY.txt, a caption a line, and KEY.json."""
    counts = {}
    for split, source in sources.items():
        (out / split).mkdir()
        counts[split], tar, names = 0, None, set()
        for number, record in enumerate(records_of(source, split)):
            if number % SHARD_SIZE == 0:
                if tar:
                    tar.close()
                tar = tarfile.open(out / split / f"{number // SHARD_SIZE:05d}.tar", "w", format=tarfile.GNU_FORMAT)
            captions = [" ".join(caption.split()) for caption in record.captions]
            told = {**record.fields, "key": record.key, "caption": captions[0], "captions": list(record.captions)}
            parts = {"txt": "\n".join(captions).encode(), "json": json.dumps(told, default=str).encode()}
            name = _name(record.key, number, names)
            for suffix, content in {record.suffix: record.image, **parts}.items():
                _add(tar, f"{name}.{suffix}", content)
            counts[split] = number + 1
        tar.close()
    return counts


def _name(key: str, number: int, names: set[str]) -> str:
    """The key without a file's ending, or a number where no tar may have such a name, or has it already."""
    name = key.rpartition(".")[0] or key
    if name in names or not re.fullmatch(r"[\w-]+(/[\w-]+)*", name, re.ASCII):
        name = f"record-{number:09d}"
    names.add(name)
    return name


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o644
    tar.addfile(member, io.BytesIO(content))


def _write_array_records(sources: Mapping[str, Source], out: Path) -> dict[str, int]:
    """Prepares the splits with a builder of TFDS: key, image, captions and fields, in their order."""
    import tensorflow_datasets as tfds

    features = tfds.features
    shapes = {
        "key": features.Text(),
        "image": features.Image(shape=(None, None, None)),
        "captions": features.Sequence(features.Text()),
        FIELDS: features.Text(),
    }

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Takes the records as they come."""

        name = NAME
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # TFDS would look for checksums of downloads beside this file, and there are none

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(shapes), disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in sources}

        def _generate_examples(self, split):
            for number, record in enumerate(records_of(sources[split], split)):
                told = json.dumps(dict(record.fields), default=str)
                image, captions = io.BytesIO(record.image), list(record.captions)
                yield number, {"key": record.key, "image": image, "captions": captions, FIELDS: told}

    tfds.disable_progress_bar()  # records_of has one
    builder = Builder(data_dir=str(out), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # it speaks of downloads, of which there are none
        builder.download_and_prepare()
    version = Path(builder.data_dir)
    for file in version.iterdir():
        os.replace(file, out / file.name)
    shutil.rmtree(out / NAME)
    shutil.rmtree(out / "downloads", ignore_errors=True)
    return {split: builder.info.splits[split].num_examples for split in sources}


FORMATS: dict[str, Callable[[Mapping[str, Source], Path], dict[str, int]]] = {
    "arrayrecord": _write_array_records,
    "webdataset": _write_tars,
}
"""What writes each format."""
