"""Data sets of TensorFlow Datasets, prepared as ArrayRecord and read without TensorFlow.

The features of such a data set say where the picture and the text are. Class labels become captions by templates.
Prepare with ``file_format="array_record"``: its parquet files lose examples, and TFRecord needs TensorFlow.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.data.records import OTHER_NAMES, Record, Rejected, clean, json_object, spread, text_of
from dalle2_jax.types import UserError

FIELDS = "json_fields"
"""The feature that holds all other fields of a record, as a JSON object."""

TEMPLATES = ("a photo of a {}",)
"""What is said of a class, by default."""

_TEXTS, _LABELS = ("caption", "captions", "text", "captions/text"), ("label",)
_KEYS = ("key", "id", "image_id", "image/filename")
"""Where text, label and key are looked for when the configuration says nothing."""


class TfdsRecords:
    """The captioned pictures of a prepared data set; a `Records`.

    Args:
        path: the folder of a prepared version, which has ``features.json``: ``~/tensorflow_datasets/cifar10/3.0.2``.
        split: of the data set, slices included: ``train[:90%]``. ``val`` may be called ``validation``.
        image: name of the picture's feature; with "/" between, one inside another.
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
        self._image = self._found(features, "image", image, ())
        self._text = None if label and not text else self._found(features, "text", text, _TEXTS)
        self._label = None if self._text else self._found(features, "label", label, _LABELS)
        if not (self._text or self._label):
            raise UserError(f"{self.path} has neither text nor label: name one of its features, {', '.join(features)}")
        self._key = self._found(features, "key", key, _KEYS)
        self._said = self._templated(features[self._label], templates) if self._label else ()
        other = OTHER_NAMES.get(split)
        found = other if split not in builder.info.splits and other in builder.info.splits else split
        self._data = _open(builder, found, self._image)
        self._spans = _spans(builder.info.splits, found)

    def __len__(self) -> int:
        return len(self._data)

    def __repr__(self) -> str:
        return f"TfdsRecords({self.path!r}, {self.split!r})"

    def read(self, index: int) -> Record:
        """Returns the picture's file, its captions and the rest of its features. Raises Rejected when unreadable."""
        example = self._example(index)
        image = _value(example, self._image)
        key = self._place(index) if self._key is None else _string(_value(example, self._key))
        used = (self._image, self._text, self._label, self._key)
        rest = {name: value for name, value in example.items() if name not in used and not isinstance(value, dict)}
        fields = {name: _plain(value) for name, value in rest.items() if np.ndim(value) == 0}
        if FIELDS in example:  # as `convert` writes them
            fields |= json_object(fields.pop(FIELDS))
        return Record(key, image, self._captions(example), fields)

    def captions(self, limit: int) -> Iterator[str]:
        """Yields the captions of at most ``limit`` records from all over the data set; bad ones are passed over.

        Raises:
            UserError: not one can be read.
        """
        indices, refused = spread(len(self), limit), 0
        for index in indices:
            try:
                yield from self._captions(self._example(index))
            except Rejected as rejection:
                refused += 1
                if refused == len(indices):
                    reason = str(rejection.__cause__).partition("\n")[0]
                    raise UserError(f"not one record of {self} can be read ({reason})") from None

    def _example(self, index: int) -> dict[str, Any]:
        try:
            return self._data[index]
        except Exception as error:  # whatever its parsers say of a damaged file
            raise Rejected("unreadable") from error

    def _place(self, index: int) -> str:
        """The split and the row in it, whatever slices were asked for."""
        for split, first, last in self._spans:
            if index < last - first:
                return f"{split}-{first + index}"
            index -= last - first
        raise IndexError(f"{index} records beyond the last")

    def _captions(self, example: dict[str, Any]) -> tuple[str, ...]:
        """The texts of an example, or what is said of its classes; one without a class (-1) has none."""
        values = np.atleast_1d(np.asarray(_value(example, self._text or self._label), object)).tolist()
        if self._text:
            return tuple(_string(text) for text in values)
        return tuple(caption for number in values if number >= 0 for caption in self._said[int(number)])

    def _found(self, features: dict[str, Any], what: str, given: str, usual: tuple[str, ...]) -> str | None:
        """The feature that is given, or else the first of the usual ones that is there."""
        named = given and given not in features
        if named or (what == "image" and not given):
            raise UserError(f"{self.path} has no feature {given!r} to be the {what}, only {', '.join(features)}")
        return given or next((name for name in usual if name in features), None)

    def _templated(self, feature: Any, templates: Sequence[str]) -> list[tuple[str, ...]]:
        """The captions of each class."""
        names = getattr(getattr(feature, "feature", feature), "names", None)
        if not names:
            raise UserError(f"feature {self._label!r} of {self.path} is no class with a name")
        wrong = next((template for template in templates if template.count("{}") != 1), None)
        if not templates or wrong is not None:
            raise UserError(f"a template has one {{}} where the class's name comes, unlike {wrong!r}")
        names = [name.replace("_", " ") for name in names]
        return [tuple(template.replace("{}", name) for template in templates) for name in names]


def _builder(path: str) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError("data of kind tfds needs tensorflow-datasets: pip install tensorflow-datasets") from None
    folder = Path(path).expanduser()
    if not (folder / "features.json").is_file():
        inside = next(iter(sorted(folder.glob("**/features.json"))), None) if folder.is_dir() else None
        hint = f"perhaps {inside.parent}" if inside else "as in ~/tensorflow_datasets/cifar10/3.0.2"
        raise UserError(f"{path} is not the folder of a prepared data set, which has features.json: {hint}")
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # whatever its parsers say of a damaged file
        raise UserError(f"{path} is damaged: {str(error).strip().splitlines()[0]}") from None


def _open(builder: Any, split: str, image: str) -> Any:
    import tensorflow_datasets as tfds

    decoders: Any = tfds.decode.SkipDecoding()
    for part in reversed(image.split("/")):
        decoders = {part: decoders}
    try:
        return builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError:
        form = builder.info.file_format and builder.info.file_format.value
        raise UserError(
            f"{builder.info.name} is prepared as {form}, which needs TensorFlow or loses examples: "
            "prepare it anew with file_format='array_record'"
        ) from None
    except Exception as error:  # an unknown split, files that are not there
        there = ", ".join(builder.info.splits) or "none, for it is not prepared"
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{builder.info.name} cannot be read as {split!r} ({reason}); its splits: {there}") from None


def _spans(splits: Any, asked: str) -> list[tuple[str, int, int]]:
    """Returns (split, first row, the row after the last) of each piece of what was asked for, in their order."""
    import tensorflow_datasets as tfds

    pieces = tfds.core.ReadInstruction.from_spec(asked).to_absolute(splits)
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
    """A value as JSON has it, for filters."""
    return _string(value) if isinstance(value, bytes) else np.asarray(value).item()
