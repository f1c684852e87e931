"""Writes the data set of emoji, as a folder of images or as tar shards."""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from dalle2_jax import lock
from dalle2_jax.data.emoji.concepts import captions_of, read_concepts
from dalle2_jax.data.emoji.packages import PACKAGES
from dalle2_jax.data.emoji.selection import Emoji, Selection, split_emoji
from dalle2_jax.data.emoji.styles import STYLES
from dalle2_jax.data.formats.folder_index import METADATA
from dalle2_jax.data.tools.convert import FORMATS, Written
from dalle2_jax.errors import DataError, UserError
from dalle2_jax.files import disk_full

DESCRIPTION = "dataset.json"
"""The file that describes a data set: its sources with checksums, licences, counts, and a checksum of its records."""


@dataclass
class _Tally:
    """What was written of a split: images by style, and a checksum of names, images and captions."""

    styles: dict[str, int]
    checksum: Any = field(default_factory=hashlib.sha256)


def write(
    out: str | Path,
    selection: Selection = Selection(),
    resolution: int = 64,
    packages: str | Path | None = None,
    tar: bool = False,
) -> dict[str, int]:
    """Writes the emoji as ``out/train``, ``out/val`` and ``out/compositional``, with ``out/dataset.json``.

    A folder has NAME.png and metadata.jsonl with file_name, text, concept, style, group, skin_tone, licence and source;
    tar shards have the same fields in NAME.json. It appears under its name only when complete, and is the same, byte
    for byte, whenever it is made with the same versions of the decoders.

    Args:
        out: the folder, which must not exist or be empty.
        selection: which emoji to include.
        resolution: side of the images in pixels.
        packages: folder of the packages' .tgz files; None fetches them with ``npm pack``.
        tar: whether to write tar shards instead of a folder of images.

    Returns:
        The number of images by split; a split without images is not written.

    Raises:
        DataError: a package is missing in ``packages``, or damaged.
        UserError: ``out`` is not empty, the disk is full, npm fails, or the renderer of SVG is not installed.
    """
    out, folder = Path(out), None if packages is None else Path(packages)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: name a new one")
    if folder is not None and not folder.is_dir():
        raise DataError(f"there is no folder {folder}: name the folder of the .tgz files that npm pack writes", folder)
    concepts = [concept for concept in read_concepts(folder) if selection.includes(concept)]
    drawings = {style: STYLES[style].drawings(resolution, folder) for style in selection.styles}
    splits = {split: emoji for split, emoji in split_emoji(concepts, drawings).items() if emoji}
    tallies = {split: _Tally(dict.fromkeys(selection.styles, 0)) for split in splits}
    records = {split: _records(split, emoji, resolution, tallies[split]) for split, emoji in splits.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with lock.unfinished(out.parent, f".{out.name}.") as unfinished:
            (FORMATS["webdataset"] if tar else _write_folders)(records, unfinished)
            (unfinished / DESCRIPTION).write_text(_description(selection, resolution, tallies))
            os.replace(unfinished, out)
    except OSError as error:
        reason = disk_full(error)
        if reason:
            raise UserError(f"{out} cannot be written ({reason})") from error
        raise
    return {split: len(emoji) for split, emoji in splits.items()}


def _records(split: str, emoji: Sequence[Emoji], resolution: int, tally: _Tally) -> Iterator[Written]:
    """Yields the records of a split and counts them."""
    for concept, style, drawing in tqdm(emoji, split, unit="image", leave=False):
        content = io.BytesIO()
        Image.fromarray(drawing.render(resolution)).save(content, "PNG")
        fields = {
            "concept": concept.name,
            "style": style,
            "group": concept.group,
            "skin_tone": concept.skin_tone,
            "licence": STYLES[style].licence,
            "source": drawing.source,
        }
        captions = captions_of(concept, STYLES[style].phrase, reworded=split == "val")
        record = Written(f"{style}/{concept.key}.png", content.getvalue(), "png", captions, fields)
        tally.styles[style] += 1
        tally.checksum.update(hashlib.sha256(record.image).digest())
        tally.checksum.update(json.dumps([record.key, captions, fields]).encode())
        yield record


def _write_folders(splits: Mapping[str, Iterator[Written]], out: Path) -> None:
    """Writes SPLIT/NAME.png and SPLIT/metadata.jsonl."""
    for split, records in splits.items():
        (out / split).mkdir()
        with (out / split / METADATA).open("w", encoding="utf-8") as metadata:
            for record in records:
                path = out / split / record.key
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(record.image)
                line = {"file_name": record.key, "text": record.captions, **record.fields}
                metadata.write(json.dumps(line, ensure_ascii=False) + "\n")


def _description(selection: Selection, resolution: int, tallies: Mapping[str, _Tally]) -> str:
    """Returns the content of dataset.json."""
    packages = [PACKAGES["captions"], *(STYLES[style].package(resolution) for style in selection.styles)]
    value = {
        "resolution": resolution,
        "skin_tones": selection.skin_tones,
        "flags": selection.flags,
        "groups": list(selection.groups),
        "styles": {
            style: {"licence": STYLES[style].licence, "credit": STYLES[style].credit} for style in selection.styles
        },
        "packages": {str(package): package.sha256 for package in packages},
        "splits": {
            split: {"images": sum(tally.styles.values()), **tally.styles, "sha256": tally.checksum.hexdigest()}
            for split, tally in tallies.items()
        },
    }
    return json.dumps(value, indent=2) + "\n"
