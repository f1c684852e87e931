"""The examples on which a system is measured: captions, images, classes."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from dalle2_jax import data
from dalle2_jax.data.images.records import Rejected
from dalle2_jax.errors import DataError, UserError
from dalle2_jax.system import stored_data
from dalle2_jax.system.system import System

CHUNK = 256
"""Images that are in memory at a time."""

MAX_ORDERED = 1_000_000
"""Examples of a data set that evaluations choose from."""


def open_source(
    system: Path,
    stage: str,
    split: str = "val",
    named: Any = None,
    trusted: bool = False,
    size: int | None = None,
) -> data.Source:
    """Opens a split of the data that the user gives, or of the data that a stage was trained on.

    Args:
      system: its folder.
      stage: the stage that is measured.
      split: "train", "val" or another split of the data.
      named: data as KIND or KIND:PATH, or in memory; None opens the data that the stage's config names.
      trusted: whether a path or URL that the stage's config names is opened.
      size: side of the images; None is that of the stage.

    Raises:
      UserError: the data cannot be read, or only the system's config names them and the system is not trusted.
    """
    if named is None:
        changes = {} if size is None else {"resolution": size}
        return stored_data.open_stored_source(system, stage, split, trusted, **changes)
    side = size or stored_data.image_side(system, stage)
    if isinstance(named, str | os.PathLike):
        return data.source_named(str(named), split, side)
    return data.as_source(named, side, split)


def check_count(num: int, source: data.Source) -> None:
    """Raises UserError if a source has fewer than ``num`` examples."""
    if num > len(source):
        raise UserError(f"num {num} is more than the {len(source)} examples of this split: reduce num")


def order(source: data.Source) -> Sequence[int]:
    """Returns the order in which evaluations take examples: random, always the same.

    A few examples then represent a data set that is sorted, by name or by class. Scenes of ``shapes`` are in random
    order already; of more than `MAX_ORDERED` examples, so many that are spread evenly are taken.
    """
    if isinstance(source, data.ShapesSource):
        return range(len(source))
    count = min(len(source), MAX_ORDERED)
    return (np.random.default_rng(0).permutation(count) * len(source) // count).tolist()


def captions(source: data.Source, indices: Sequence[int]) -> list[str]:
    """Returns the caption of each example that evaluations use."""
    chosen = source.select(("caption",))
    starts = range(0, len(indices), CHUNK)
    return [caption for start in starts for caption in chosen.fetch(indices[start : start + CHUNK])["caption"]]


def embed_images(system: System, source: data.Source, indices: Sequence[int]) -> Float32[np.ndarray, "N E"]:
    """Returns the CLIP embeddings of the images of examples, of unit length."""
    images, starts = source.select(("image",)), range(0, len(indices), CHUNK)
    rows = [system.embed_image(images.fetch(indices[start : start + CHUNK])["image"]) for start in starts]
    emb = np.concatenate(rows)
    return emb / np.maximum(np.linalg.norm(emb, axis=1, keepdims=True), np.float32(1e-12))


def distinct(source: data.Source, count: int) -> list[int]:
    """Returns the indices of the first ``count`` examples, in the order of `order`, no two of which share a caption.

    For ``shapes`` these are scenes that differ in more than the background, which captions may omit, and the order of
    their objects ("a left of b", "b right of a"); for other sources, examples with different captions. There are fewer
    if the source has no more.
    """
    seen, indices = set(), []
    named = source.select(("caption",))
    for index in order(source):
        if isinstance(source, data.ShapesSource):
            *objects, relation, _ = source.scene(index).attributes
            identity = frozenset(objects), relation in ("above", "below")
        else:
            identity = data.example(named, index)["caption"]
        if identity not in seen:
            seen.add(identity)
            indices.append(index)
            if len(indices) == count:
                break
    return indices


def fields(source: data.Source, indices: Sequence[int], name: str) -> list[str]:
    """Returns a field of the record of each example.

    For ``shapes`` the fields are "object", the colour and the shape of the first object, "colour", "shape", "size" and
    "background".

    Raises:
      DataError: a record has no such field, with the fields that it has.
    """
    return [_field(source, index, name) for index in indices]


def _field(source: data.Source, index: int, name: str) -> str:
    known = record_fields(source, index)
    if name not in known:
        raise DataError(f"example {index} of {source} has no field {name!r}: it has {', '.join(known) or 'none'}")
    return str(known[name])


def record_fields(source: data.Source, index: int) -> dict[str, Any]:
    """Returns the fields of an example's record; {} for data without records.

    Raises:
      DataError: the record cannot be read.
    """
    if isinstance(source, data.ShapesSource):
        scene = source.scene(index)
        first = scene.objects[0]
        own = {"colour": first.colour, "shape": first.shape, "size": first.size, "background": scene.background}
        return {"object": f"{first.colour} {first.shape}", **own}
    if not isinstance(source, data.ImageSource):
        return {}
    try:
        return dict(source.records.read(index).fields)
    except Rejected as rejection:
        raise DataError(f"record {index} of {source} cannot be read ({rejection.cause})") from None
