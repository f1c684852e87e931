"""Checks of a prepared TFDS data set's JSON files, before TensorFlow Datasets reads them.

TFDS imports the module of every feature class that ``features.json`` or ``dataset_info.json`` names, opens the files of
class names that a feature names, and formats shard names by templates from ``dataset_info.json``. An untrusted data
set could thus run any module and read any file. Here every class must be one of TFDS's own, and every file must be in
the folder of the data set.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dalle2_jax.errors import UserError
from dalle2_jax.reading import open_regular, parse_json

FEATURES, INFO = "features.json", "dataset_info.json"

TEMPLATES = ("a photo of a {}",)
"""Default captions of a class, with its name in place of {}."""

_MODULES = "tensorflow_datasets.core.features"
CLASSES = frozenset(
    f"{_MODULES}.{name}"
    for name in (
        "audio_feature.Audio",
        "bounding_boxes.BBoxFeature",
        "class_label_feature.ClassLabel",
        "dataset_feature.Dataset",
        "feature.Tensor",  # the name of tensor_feature.Tensor until TFDS 4.5
        "features_dict.FeaturesDict",
        "image_feature.Image",
        "labeled_image.LabeledImage",
        "scalar.Scalar",
        "sequence_feature.Sequence",
        "tensor_feature.Tensor",
        "text_feature.Text",
        "translation_feature.Translation",
        "translation_feature.TranslationVariableLanguages",
        "video_feature.Video",
    )
)
"""The feature classes that a data set may name. ``import tensorflow_datasets`` loads them: none is imported by name."""

_CLASS_KEYS = ("type", "pythonClassName", "python_class_name")
_FILE_KEYS = ("names_file", "labels")  # a string there is the path of a file of class names
_VARIABLES = "DATASET|SPLIT|FILEFORMAT|SHARD_INDEX|NUM_SHARDS|SHARD_X_OF_Y"
_TEMPLATE = re.compile(rf"(?:[\w.\-/]|{{(?:{_VARIABLES})}})*")

_MAX_BYTES, _MAX_DEPTH, _MAX_SHARDS = 2**26, 64, 1_000_000
"""Limits on the size of each file, on the nesting of its JSON, and on the shards of a split."""


def check_metadata(folder: Path) -> None:
    """Checks the files of a prepared data set that TFDS reads when it opens it.

    Raises:
        UserError: a file is damaged, too large or nested too deep, or names a class that is not in ``CLASSES``, or a
            file outside the folder.
    """
    for path in folder.glob("*.labels.txt"):
        _open(path).close()
    features, info = _read(folder / FEATURES), _read(folder / INFO)
    _check_features(features, folder / FEATURES)
    if isinstance(info, dict):
        _check_features(info.get("features"), folder / INFO)
        _check_names(info, folder / INFO)


def _open(path: Path) -> BinaryIO:
    """Opens a regular file of at most ``_MAX_BYTES``. UserError for anything else."""
    try:
        return open_regular(path, _MAX_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read as a file of a prepared data set ({error.strerror})") from None


def _read(path: Path) -> Any:
    try:
        with _open(path) as file:
            return parse_json(file.read())
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not JSON, {error}") from None


def _check_features(content: Any, path: Path) -> None:
    """Checks every class and file that a description of features names, at any depth and in JSON within strings."""
    for key, text in _strings(content, path):
        if key in _CLASS_KEYS and text not in CLASSES:
            raise UserError(
                f"{path} names the feature class {text!r}, which is none of TFDS's own: a data set with a class of its "
                "own runs that code when it is opened, so it is rejected: write it as tar shards instead"
            )
        if key in _FILE_KEYS:
            raise UserError(
                f"{path} names a file in its field {key!r}, {text!r}: move the class names to FEATURE.labels.txt"
            )


def _strings(content: Any, path: Path) -> Iterator[tuple[str, str]]:
    """Yields (key, value) of every string that is the value of a key. UserError where nesting exceeds the limit."""
    waiting = [("", content, 0)]
    while waiting:
        key, value, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise UserError(f"{path} is damaged: it is nested deeper than {_MAX_DEPTH} levels")
        if isinstance(value, dict):
            waiting += [(name, inner, depth + 1) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [("", inner, depth + 1) for inner in value]
        elif isinstance(value, str):
            yield key, value
            if value.lstrip().startswith(("{", "[")):  # TFDS keeps the content of some features as JSON in a string
                try:
                    waiting.append((key, json.loads(value), depth + 1))
                except ValueError:
                    continue
                except RecursionError:
                    raise UserError(f"{path} is damaged: it is nested deeper than {_MAX_DEPTH} levels") from None


def _check_names(info: dict[str, Any], path: Path) -> None:
    """Checks the names of the data set and of its splits, of which TFDS makes the paths of the shards."""
    splits = info.get("splits") or []
    if not isinstance(splits, list) or not all(isinstance(split, dict) for split in splits):
        raise UserError(f"{path} is damaged: splits is no list of objects")
    for name in (info.get("name"), *(split.get("name") for split in splits)):
        if name is not None and (not isinstance(name, str) or re.search(r"[/\\\0{}]|^\.\.?$", name)):
            raise UserError(f"{path} has the name {name!r}, which leads out of the folder")
    for split in splits:
        for field in ("filepathTemplate", "filepath_template"):
            template = split.get(field) or ""
            inside = isinstance(template, str) and _TEMPLATE.fullmatch(template)
            if not inside or template.startswith("/") or ".." in template.split("/"):
                raise UserError(f"{path} has the {field} {template!r}, which leads out of the folder")
        for field in ("shardLengths", "shard_lengths"):
            if len(split.get(field) or ()) > _MAX_SHARDS:
                raise UserError(f"{path} lists more than {_MAX_SHARDS} shards of a split")
