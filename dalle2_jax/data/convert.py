"""Writes a data set in another format: ArrayRecord, as TFDS prepares it, or tar shards as img2dataset makes them.

Pictures keep the bytes of their files; those that are drawn become PNG. Records that cannot be used are left out. What
is written appears under its name when it is complete.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from dalle2_jax.data.pictures import PictureSource, bearable, check_aspect, header, too_many
from dalle2_jax.data.records import LeftOut, Rejected, caption_lines, captions_in, clean, name_of, text_of
from dalle2_jax.data.sources import Source
from dalle2_jax.data.tfds import FIELDS
from dalle2_jax.files import disk_full
from dalle2_jax.types import UserError

SHARD_SIZE = 10_000
"""Pictures a tar shard."""

NAME = "captioned_pictures"
"""Of the data set that is written as ArrayRecord, and its folder."""

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


class Written(NamedTuple):
    """A record as it is written: a picture file's bytes and its ending, and what is said of it."""

    key: str
    image: bytes
    suffix: str
    captions: tuple[str, ...]
    fields: Mapping[str, Any]


class Conversion(NamedTuple):
    """What came of it: ``counts`` of pictures by split, and the records of all splits that are ``left_out``."""

    counts: dict[str, int]
    left_out: LeftOut


def convert(sources: Mapping[str, Source], out: Path, form: str) -> Conversion:
    """Writes splits of a data set.

    Args:
        sources: the splits, by name.
        out: the folder, which must not exist or be empty.
        form: one of ``FORMATS``.

    Raises:
        UserError: ``out`` holds something or the disk is full, or a split has no picture that can be used, or more bad
            records than its ``max_rejected``.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: name a new one")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    found = Conversion(dict.fromkeys(sources, 0), LeftOut())
    try:
        FORMATS[form]({split: records_of(source, split, found) for split, source in sources.items()}, unfinished)
        unfinished.chmod(0o755)
        os.replace(unfinished, out)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = disk_full(error)
        if reason and isinstance(error, OSError | RuntimeError):  # the latter is what array_record raises
            raise UserError(f"{out} cannot be written ({reason})") from error
        raise
    return found


def records_of(source: Source, split: str, found: Conversion) -> Iterator[Written]:
    """Yields what is written of a source, and counts it in ``found``.

    Raises:
        UserError: it is nothing, or too many records are bad.
    """
    known = getattr(source.records, "left_out", LeftOut()) if isinstance(source, PictureSource) else LeftOut()
    found.left_out.include(known)
    bad = known.counts.total()
    total = bad + len(source)
    for index in tqdm(range(len(source)), desc=split, unit="picture"):
        try:
            record = _stored(source, index) if isinstance(source, PictureSource) else _drawn(source, index)
        except Rejected as rejection:
            bad += 1
            [where] = getattr(rejection, "__notes__", [f"record {index} of {split}"])[:1]
            found.left_out.add(rejection.cause, where)
            if bad > bearable(total, source.max_rejected):
                told = f"{bad} of {total} records of {source}"
                raise too_many(told, str(found.left_out), source.max_rejected) from None
            continue
        found.counts[split] += 1
        yield record
    if not found.counts[split]:
        raise UserError(f"not one picture of {source} can be written ({found.left_out})")


def _stored(source: PictureSource, index: int) -> Written:
    record = source.records.read(index)
    if not record.captions:
        raise Rejected("no caption")
    if record.image is None:
        raise Rejected("no picture")
    content = _png(record.image) if isinstance(record.image, np.ndarray) else record.image
    return Written(record.key, content, _suffix(content), record.captions, record.fields)


def _suffix(content: bytes) -> str:
    """The ending of a picture file, by its header. Raises Rejected for one that no training would take."""
    kind, size = header(content)
    if kind not in _SUFFIXES:
        raise Rejected("not a picture")
    check_aspect(*size)
    return _SUFFIXES[kind]


def _drawn(source: Source, index: int) -> Written:
    example = source[index]
    return Written(f"{index:08d}", _png(example["image"]), "png", example["captions"], {})


def _png(picture: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()


def _write_tars(splits: Mapping[str, Iterator[Written]], out: Path) -> None:
    """Writes SPLIT/00000.tar ..: of each picture NAME.png (or .jpg ..), NAME.txt and NAME.json.

    The text has a caption a line, and is left out where lines would not give back the captions as they are. The JSON
    has the fields as `_told` says. A name is as `_name` says.
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
    told = json.dumps(_told(record, exact), default=str).encode()
    name = _name(record.key, names)
    names.add(name)
    for suffix, content in {record.suffix: record.image, **({"txt": text} if exact else {}), "json": told}.items():
        _add(tar, f"{name}.{suffix}", content)


def _told(record: Written, texted: bool) -> dict[str, Any]:
    """The fields of a record as its JSON has them: its own, and its captions as ``caption``.

    Beside a text that is the first caption, unless the record has such a field. Without one it is all of them, from
    which they are read; a field of that name is then called ``caption_field``, with as many "_" as keep it from
    another.
    """
    fields = dict(record.fields)
    if texted:
        return fields | {"caption": fields.get("caption", record.captions[0])}
    with contextlib.suppress(TypeError):
        if captions_in(fields.get("caption")) == record.captions:
            return fields
    if "caption" in fields:
        aside = "caption_field"
        while aside in fields:
            aside += "_"
        fields[aside] = fields["caption"]
    return fields | {"caption": list(record.captions)}


def _name(key: str, taken: set[str]) -> str:
    """What a record is called in a tar: its name, or one made of it where readers would see another, or it is taken.

    Then dots give way, for readers take all after the first for the ending, and a digest of the key tells it from
    others. It does not depend on the place among them.
    """
    name = name_of(key)
    if name not in taken and _legible(name):
        return name
    parts = [part for part in clean(name).replace("\0", "_").split("/") if part not in ("", ".", "..")] or ["record"]
    parts[-1] = parts[-1].replace(".", "_")
    made = (f"{'/'.join(parts)}_{_digest(key, time)}" for time in itertools.count())
    return next(name for name in made if name not in taken)


def _legible(name: str) -> bool:
    """Whether readers of tar shards find a record under this name."""
    parts = name.split("/")
    return clean(name) == name and "\0" not in name and "." not in parts[-1] and not {"", ".", ".."} & {*parts}


def _digest(key: str, time: int) -> str:
    """A few letters that tell a key from others; ``time`` is how often it was there before."""
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
        """Takes the records as they come."""

        name = NAME
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # TFDS would look for checksums of downloads beside this file, and there are none

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(shapes), disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for number, record in enumerate(splits[split]):
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


FORMATS: dict[str, Callable[[Mapping[str, Iterator[Written]], Path], None]] = {
    "arrayrecord": _write_array_records,
    "webdataset": _write_tars,
}
"""What writes each format."""
