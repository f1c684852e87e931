"""Writes a data set in another format: ArrayRecord, as TFDS prepares it, or tar shards, as img2dataset writes them.

Images keep the bytes of their files; rendered images are written as PNG. Records that cannot be used are omitted. The
output appears under its name when it is complete.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from dalle2_jax import lock
from dalle2_jax.data.formats.tfds import FIELDS
from dalle2_jax.data.images.records import (
    Rejected,
    RejectionCounts,
    caption_lines,
    captions_in,
    clean,
    name_of,
    text_of,
)
from dalle2_jax.data.images.source import (
    ImageSource,
    check_aspect,
    header,
    max_bad,
    too_many_error,
)
from dalle2_jax.data.sources import Source, example
from dalle2_jax.errors import UserError
from dalle2_jax.files import disk_full

SHARD_SIZE = 10_000
"""Images per tar shard."""

NAME = "captioned_pictures"
"""Name of the data set that is written as ArrayRecord, and of its folder."""

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


class Written(NamedTuple):
    """A record as it is written: the bytes of an image file and its suffix, its captions and other fields."""

    key: str
    image: bytes
    suffix: str
    captions: tuple[str, ...]
    fields: Mapping[str, Any]


class Conversion(NamedTuple):
    """The result of a conversion: the number of images by split, and the rejected records of all splits."""

    counts: dict[str, int]
    rejections: RejectionCounts


def convert(sources: Mapping[str, Source], out: str | Path, form: str) -> Conversion:
    """Writes splits of a data set.

    Args:
        sources: the splits, by name.
        out: the folder, which must not exist or be empty.
        form: one of ``FORMATS``.

    Raises:
        UserError: ``out`` is not empty, the disk is full, or a split has no usable image, or more bad records than its
            ``max_rejected``.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: name a new one")
    out.parent.mkdir(parents=True, exist_ok=True)
    found = Conversion(dict.fromkeys(sources, 0), RejectionCounts())
    try:
        with lock.unfinished(out.parent, f".{out.name}.") as folder:
            FORMATS[form]({split: records_of(source, split, found) for split, source in sources.items()}, folder)
            os.replace(folder, out)
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        reason = disk_full(error)
        if reason:
            raise UserError(f"{out} cannot be written ({reason})") from error
        raise
    return found


def records_of(source: Source, split: str, found: Conversion) -> Iterator[Written]:
    """Yields the records of a source as they are written, and counts them in ``found``.

    Raises:
        UserError: there are none, or too many are bad.
    """
    stored = isinstance(source, ImageSource)
    before = source.records.rejections if stored else RejectionCounts()
    found.rejections.include(before)
    bad = before.counts.total()
    total = bad + len(source)
    for index in tqdm(range(len(source)), desc=split, unit="image"):
        try:
            record = _stored(source, index) if stored else _rendered(source, index)
        except Rejected as rejection:
            bad += 1
            found.rejections.add(rejection.cause, (*rejection.notes, f"record {index} of {split}")[0])
            if stored and bad > max_bad(total, source.max_rejected):
                counts = f"{bad} of {total} records of {source}"
                raise too_many_error(counts, str(found.rejections), source.max_rejected) from None
            continue
        found.counts[split] += 1
        yield record
    if not found.counts[split]:
        raise UserError(f"no image of {source} can be written ({found.rejections}): fix the data set")


def _stored(source: ImageSource, index: int) -> Written:
    record = source.records.read(index)
    if not record.captions:
        raise Rejected("no caption")
    if record.image is None:
        raise Rejected("no image")
    content = _png(record.image) if isinstance(record.image, np.ndarray) else record.image
    return Written(record.key, content, _suffix(content), record.captions, record.fields)


def _suffix(content: bytes) -> str:
    """Returns the suffix of an image file, from its header. Raises Rejected if it cannot be used for training."""
    kind, size = header(content)
    if kind not in _SUFFIXES:
        raise Rejected("not an image")
    check_aspect(*size)
    return _SUFFIXES[kind]


def _rendered(source: Source, index: int) -> Written:
    one = example(source, index)
    return Written(f"{index:08d}", _png(one["image"]), "png", one["captions"], {})


def _png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()


def _write_tars(splits: Mapping[str, Iterator[Written]], out: Path) -> None:
    """Writes SPLIT/00000.tar and so on, with NAME.png (or .jpg ..), NAME.txt and NAME.json for each image.

    The text has one caption per line, and is omitted if its lines would not restore the captions exactly. See
    `_json_fields` for the JSON and `_name` for the name.
    """
    for split, records in splits.items():
        (out / split).mkdir()
        names: set[str] = set()
        for number in itertools.count():
            first = next(records, None)
            if first is None:
                break
            path = out / split / f"{number:05d}.tar"
            with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
                for record in itertools.chain([first], itertools.islice(records, SHARD_SIZE - 1)):
                    _write_record(tar, record, names)


def _write_record(tar: tarfile.TarFile, record: Written, names: set[str]) -> None:
    text = "\n".join(record.captions).encode("utf-8", "replace")
    exact = caption_lines(text_of(text)) == record.captions
    fields = json.dumps(_json_fields(record, exact), default=str).encode()
    name = _name(record.key, names)
    names.add(name)
    for suffix, content in {record.suffix: record.image, **({"txt": text} if exact else {}), "json": fields}.items():
        _add(tar, f"{name}.{suffix}", content)


def _json_fields(record: Written, has_text: bool) -> dict[str, Any]:
    """Returns the JSON of a record: its fields, and ``caption``.

    With a text file, ``caption`` is the first caption, unless the record has a field of that name. Without one, it is
    the list of all captions, and such a field is renamed to ``caption_field``, with a "_" more while that exists.
    """
    fields = dict(record.fields)
    if has_text:
        return fields | {"caption": fields.get("caption", record.captions[0])}
    with contextlib.suppress(TypeError):
        if captions_in(fields.get("caption")) == record.captions:
            return fields
    if "caption" in fields:
        renamed = "caption_field"
        while renamed in fields:
            renamed += "_"
        fields[renamed] = fields["caption"]
    return fields | {"caption": list(record.captions)}


def _name(key: str, taken: set[str]) -> str:
    """Returns the name of a record in a tar: its own, or a variant if that is taken or would be read as another name.

    A variant has no dots, since readers take everything after the first for the suffix, and ends with a digest of the
    key, which does not depend on the order of the records.
    """
    name = name_of(key)
    if name not in taken and _legible(name):
        return name
    parts = [part for part in clean(name).replace("\0", "_").split("/") if part not in ("", ".", "..")] or ["record"]
    parts[-1] = parts[-1].replace(".", "_")
    made = (f"{'/'.join(parts)}_{_digest(key, time)}" for time in itertools.count())
    return next(name for name in made if name not in taken)


def _legible(name: str) -> bool:
    """Returns whether readers of tar shards find a record under this name."""
    parts = name.split("/")
    return clean(name) == name and "\0" not in name and "." not in parts[-1] and not {"", ".", ".."} & {*parts}


def _digest(key: str, time: int) -> str:
    """Returns a short digest of a key; ``time`` is the number of earlier records with the same key."""
    return hashlib.sha256(f"{key}\0{time}".encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o644
    tar.addfile(member, io.BytesIO(content))


def _write_array_records(splits: Mapping[str, Iterator[Written]], out: Path) -> None:
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
        """Writes the records in their order."""

        name = NAME
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # TFDS would look for checksums of downloads next to this file

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(shapes), disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for number, record in enumerate(splits[split]):
                fields = json.dumps(dict(record.fields), default=str)
                image, captions = io.BytesIO(record.image), list(record.captions)
                yield number, {"key": record.key, "image": image, "captions": captions, FIELDS: fields}

    tfds.disable_progress_bar()  # records_of has one
    builder = Builder(data_dir=str(out), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # it reports downloads, and there are none
        builder.download_and_prepare()
    version = Path(builder.data_dir)
    for file in version.iterdir():
        os.replace(file, out / file.name)
    shutil.rmtree(out / NAME)
    shutil.rmtree(out / "downloads", ignore_errors=True)


FORMATS: dict[str, Callable[[Mapping[str, Iterator[Written]], Path], None]] = {
    "arrayrecord": _write_array_records,
    "webdataset": _write_tars,
}
"""Writers by the name of the format."""
