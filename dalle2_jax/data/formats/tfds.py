"""Data sets of TensorFlow Datasets (TFDS), prepared as ArrayRecord and read without TensorFlow.

Features of such a data set hold the image and the text. Class labels become captions by templates. Prepare it with
``file_format="array_record"``: parquet files lose examples, and TFRecord needs TensorFlow.

The files may come from an untrusted source. `tfds_metadata` checks the JSON files before TFDS reads them. Of a record
only features are parsed that are stored as they are (text, numbers, class numbers), and the bytes of one image file,
which `images` decodes: TFDS would decode every image with all formats that its libraries know.
"""

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.data.formats.tfds_metadata import FEATURES, INFO, TEMPLATES, check_metadata
from dalle2_jax.data.images.records import (
    OTHER_NAMES,
    Record,
    Rejected,
    RejectionCounts,
    clean,
    json_object,
    spread,
    text_of,
)
from dalle2_jax.errors import UserError

FIELDS = "json_fields"
"""The feature that holds all other fields of a record, as a JSON object."""

_TEXTS, _LABELS = ("caption", "captions", "text", "captions/text"), ("label",)
_KEYS = ("key", "id", "image_id", "image/filename")
"""Features that are used as text, label and key if the config names none."""

_FORMAT = "array_record"
_RECORDS_PER_BYTE, _MAX_RECORDS = 1024, 2**24
"""Limits on the records that the metadata may claim for a shard: per byte of its file, and without a file."""


class TfdsRecords:
    """The captioned images of a prepared data set; a `Records`.

    Args:
        path: the folder of a prepared version, which has ``features.json``: ``~/tensorflow_datasets/cifar10/3.0.2``.
        split: of the data set, slices included: ``train[:90%]``. ``val`` may be called ``validation``.
        image: name of the image's feature; with "/" between, one inside another.
        text: name of the captions' feature; "" looks for ``caption``, ``captions`` or ``text``.
        label: name of the class's feature, used where there is no text; "" looks for ``label``.
        key: name of the feature that names a record; "" looks for ``key``, ``id`` ... Without one a record is named by
            its split and row, ``train-123``, the same in every slice.
        templates: captions of a class, its name in place of {}.

    Raises:
        UserError: when the data set is not prepared as ArrayRecord, or has no such split or feature.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        image: str = "image",
        text: str = "",
        label: str = "",
        key: str = "",
        templates: Sequence[str] = TEMPLATES,
    ) -> None:
        self.path, self.split = str(path), split
        builder = _builder(self.path)
        features = _flat(builder.info.features)
        self._image = self._found(features, "image", image, ()) or image
        self._text = None if label and not text else self._found(features, "text", text, _TEXTS)
        self._label = None if self._text else self._found(features, "label", label, _LABELS)
        if not (self._text or self._label):
            raise UserError(f"{self.path} has neither text nor label: name one of its features, {', '.join(features)}")
        self._key = self._found(features, "key", key, _KEYS)
        self._class_captions = self._templated(features[self._label], templates) if self._label else ()
        other = OTHER_NAMES.get(split)
        found = other if other and split not in builder.info.splits and other in builder.info.splits else split
        self._data = _open(builder, found)
        self._features, self._decoders = _subset(builder.info.features, self._image, self._used())
        self._spans = _spans(builder.info.splits, found)
        self.rejections = RejectionCounts()

    def _used(self) -> tuple[str | None, ...]:
        """Returns the features that are used besides the image."""
        return self._text, self._label, self._key

    def __len__(self) -> int:
        return len(self._data)

    def __repr__(self) -> str:
        return f"TfdsRecords({self.path!r}, {self.split!r})"

    def read(self, index: int) -> Record:
        """Returns the bytes of the image file, the captions and the other features. Raises Rejected if unreadable."""
        example = self._example(index)
        image = _value(example, self._image)
        key = self._place(index) if self._key is None else _string(_value(example, self._key))
        used = (self._image, *self._used())
        rest = {name: value for name, value in example.items() if name not in used and not isinstance(value, dict)}
        fields = {name: _plain(value) for name, value in rest.items() if np.ndim(value) == 0}
        if FIELDS in example:  # as `convert` writes them
            fields |= json_object(fields.pop(FIELDS))
        return Record(key, image, self._captions(example), fields)

    def captions(self, limit: int) -> Iterator[str]:
        """Yields the captions of at most ``limit`` records, evenly spread over the data set; skips bad ones.

        Raises:
            UserError: none can be read.
        """
        indices, rejected = spread(len(self), limit), 0
        for index in indices:
            try:
                yield from self._captions(self._example(index))
            except Rejected as rejection:
                rejected += 1
                if rejected == len(indices):
                    reason = str(rejection.__cause__).partition("\n")[0]
                    raise UserError(f"no record of {self} can be read ({reason}): prepare the data set again") from None

    def _example(self, index: int) -> dict[str, Any]:
        try:
            return self._features.deserialize_example_np(self._data[index], decoders=self._decoders)
        except Exception as error:  # parsers raise any exception for a damaged file
            raise Rejected("unreadable") from error

    def _place(self, index: int) -> str:
        """Returns the name of a record, its split and row, which do not depend on the slices in use."""
        for split, first, last in self._spans:
            if index < last - first:
                return f"{split}-{first + index}"
            index -= last - first
        raise IndexError(f"{index} records beyond the last")

    def _captions(self, example: dict[str, Any]) -> tuple[str, ...]:
        """Returns the captions of an example, of its text or its classes; an example without a class (-1) has none."""
        values = np.atleast_1d(np.asarray(_value(example, self._text or self._label or ""), object)).tolist()
        if self._text:
            return tuple(_string(text) for text in values)
        return tuple(caption for number in values if number >= 0 for caption in self._class_captions[int(number)])

    def _found(self, features: dict[str, Any], what: str, given: str, usual: tuple[str, ...]) -> str | None:
        """Returns the given feature, or else the first of the usual ones that exists."""
        named = given and given not in features
        if named or (what == "image" and not given):
            raise UserError(f"{self.path} has no feature {given!r} to be the {what}, only {', '.join(features)}")
        return given or next((name for name in usual if name in features), None)

    def _templated(self, feature: Any, templates: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns the captions of each class."""
        names = getattr(getattr(feature, "feature", feature), "names", None)
        if not names:
            raise UserError(f"feature {self._label!r} of {self.path} is no class with a name")
        wrong = next((template for template in templates if template.count("{}") != 1), None)
        if not templates or wrong is not None:
            raise UserError(f"a template needs exactly one {{}} for the name of the class, got {wrong!r}")
        names = [name.replace("_", " ") for name in names]
        return [tuple(template.replace("{}", name) for template in templates) for name in names]


def _builder(path: str) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError("data of kind tfds needs tensorflow-datasets: pip install tensorflow-datasets") from None
    folder = Path(os.path.expanduser(path))
    if not (folder / FEATURES).is_file():
        inside = next(iter(sorted(folder.glob(f"**/{FEATURES}"))), None) if folder.is_dir() else None
        hint = f"perhaps {inside.parent}" if inside else "as in ~/tensorflow_datasets/cifar10/3.0.2"
        raise UserError(f"{path} is not the folder of a prepared data set, with a features.json: {hint}")
    check_metadata(folder)
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # parsers raise any exception for a damaged file
        raise UserError(f"{path} is damaged: {str(error).strip().splitlines()[0]}") from None


def _open(builder: Any, split: str) -> Any:
    """Opens a split; its records are the bytes of an example each."""
    import tensorflow_datasets as tfds

    forms = {form.value for form in builder.info.available_file_formats()}
    if _FORMAT not in forms:
        raise UserError(
            f"{builder.info.name} is prepared as {' and '.join(sorted(forms)) or 'nothing'}, which needs TensorFlow or "
            f"loses examples: prepare it again with file_format={_FORMAT!r}"
        )
    try:
        data = builder.as_data_source(
            split=split, file_format=_FORMAT, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        shards = builder.info.splits[split].file_instructions
    except Exception as error:  # an unknown split, or missing files
        there = ", ".join(builder.info.splits) or "none, since it is not prepared"
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{builder.info.name} cannot be read as {split!r} ({reason}); its splits: {there}") from None
    for shard in shards:
        _check_count(Path(shard.filename), shard.examples_in_shard)
    return data


def _check_count(shard: Path, count: int) -> None:
    """Raises UserError for a shard that is no regular file or cannot hold so many records; one may be missing."""
    try:
        status = shard.stat()
    except OSError:
        limit = _MAX_RECORDS
    else:
        limit = _RECORDS_PER_BYTE * status.st_size if stat.S_ISREG(status.st_mode) else -1
    if count > limit:
        raise UserError(f"{shard} does not hold the {count} records that {INFO} claims: prepare the data set again")


def _subset(features: Any, image: str, used: Iterable[str | None]) -> tuple[Any, Any]:
    """Returns the features that are read and their decoders: the image's file, and what is stored as it is.

    Raises:
        UserError: one of ``used`` is stored in another form.
    """
    import tensorflow_datasets as tfds

    def is_plain(feature: Any) -> bool:
        while type(feature) is tfds.features.Sequence:  # of its subclasses, Dataset needs TensorFlow
            feature = feature.feature
        stored = isinstance(feature, tfds.features.Tensor) and feature.get_serialized_info()
        return isinstance(stored, tfds.features.TensorInfo) and stored.np_dtype == feature.np_dtype

    flat = _flat(features)
    selected: dict[str, Any] = {name: True for name, feature in features.items() if is_plain(feature)}
    for name in filter(None, used):
        if not is_plain(flat[name]):
            raise UserError(f"feature {name!r} is {type(flat[name]).__name__}, neither text nor numbers: name another")
        _put(selected, features, name, True)
    _put(selected, features, image, True)
    decoders: dict[str, Any] = {}
    _put(decoders, features, image, tfds.decode.SkipDecoding())
    return _selected(features, selected), decoders


def _selected(features: Any, marked: Any) -> Any:
    """Returns the features that a tree marks with True. tfds.decode.PartialDecoding does it too, but by TensorFlow."""
    import tensorflow_datasets as tfds

    if marked is True:
        return features
    if type(features) is tfds.features.Sequence:
        length = features.to_json_content().length
        return tfds.features.Sequence(_selected(features.feature, marked), None if length == -1 else length)
    if not isinstance(features, tfds.features.FeaturesDict):
        raise UserError(f"features within a {type(features).__name__} cannot be read: {', '.join(marked)}")
    return tfds.features.FeaturesDict({name: _selected(features[name], inner) for name, inner in marked.items()})


def _put(tree: dict[str, Any], features: Any, name: str, value: Any) -> None:
    """Sets a feature's place in a tree of the form of ``features``; with "/" between names, one inside another."""
    *outer, last = [name] if name in features else name.split("/")
    for part in outer:
        tree = tree.setdefault(part, {})
    tree[last] = value


def _spans(splits: Any, spec: str) -> list[tuple[str, int, int]]:
    """Returns (split, first row, row after the last) of each piece of a split, in order."""
    import tensorflow_datasets as tfds

    pieces = tfds.core.ReadInstruction.from_spec(spec).to_absolute(splits)
    counts = [splits[piece.splitname].num_examples for piece in pieces]
    return [
        (piece.splitname, piece.from_ or 0, count if piece.to is None else piece.to)
        for piece, count in zip(pieces, counts, strict=True)
    ]


def _flat(features: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the features that hold values, those inside others as "outer/inner"."""
    found = {}
    for name, feature in features.items():
        inner = next((one for one in (feature, getattr(feature, "feature", None)) if hasattr(one, "items")), None)
        found |= {f"{prefix}{name}": feature} if inner is None else _flat(inner, f"{prefix}{name}/")
    return found


def _value(example: Any, name: str) -> Any:
    for part in name.split("/") if name not in example else [name]:
        example = example[part]
    return example


def _string(value: Any) -> str:
    return clean(text_of(value) if isinstance(value, bytes) else str(value))


def _plain(value: Any) -> Any:
    """Returns a value as a Python string or number, for filters."""
    return _string(value) if isinstance(value, bytes) else np.asarray(value).item()
