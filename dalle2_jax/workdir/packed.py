"""A packed checkpoint: the averaged weights and the statistics of a stage in one safetensors file.

    <step>/weights.safetensors    tensors "ema/..." and "stats/...", named by their paths in the trees
    <step>/digests.json

It holds what sampling, evaluation and fine-tuning read, and no state of an optimizer to resume training with.
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from dalle2_jax.errors import UserError
from dalle2_jax.files import write_atomically
from dalle2_jax.workdir import digests

FILE = "weights.safetensors"

TREES = ("ema", "stats")
"""Names of the trees of a packed checkpoint."""


def is_packed(path: pathlib.Path) -> bool:
    """Whether a checkpoint's folder holds a packed checkpoint."""
    return (path / FILE).is_file()


def rounded(tree: Any, dtype: Any) -> Any:
    """Returns a tree as numpy arrays, with float32 arrays of two or more axes in another dtype.

    Biases, scales and other vectors remain float32.

    Args:
      tree: of arrays.
      dtype: such as bfloat16, to which values are rounded to the nearest.
    """

    def stored(leaf: Any) -> np.ndarray:
        array = np.asarray(leaf)
        return array.astype(dtype) if array.dtype == np.float32 and array.ndim > 1 else array

    return jax.tree.map(stored, tree)


def write(path: pathlib.Path, trees: Mapping[str, Any]) -> None:
    """Writes a packed checkpoint with its digests.

    Args:
      path: the checkpoint's folder, which is created.
      trees: numpy arrays, by the names in `TREES`.

    Raises:
      OSError: it cannot be written.
    """
    write_atomically(path / FILE, save({name: np.asarray(leaf, order="C") for name, leaf in _named(trees)}))
    digests.write(path)


def check_trees(path: pathlib.Path, names: Iterable[str]) -> None:
    """Raises UserError if one of the trees is not among those of a packed checkpoint."""
    if {*names} - {*TREES}:
        raise UserError(
            f"{path} is a packed checkpoint: it has averaged weights only, so training cannot continue in its folder. "
            "Start from it in another --workdir with --config.init_from"
        )


def load(path: pathlib.Path, requested: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the trees of a packed checkpoint.

    Args:
      path: the checkpoint's folder.
      requested: trees of ShapeDtypeStruct with shardings, by name. Arrays are returned in these dtypes.

    Raises:
      ValueError: the file's tensors are not those of the trees, in names or shapes.
      safetensors.SafetensorError: the file is damaged.
    """
    leaves = dict(_named(requested))
    with safe_open(path / FILE, "np") as file:
        found = {name for name in file.keys() if name.split("/")[0] in requested}
        if found != {*leaves}:
            differing = sorted(found ^ {*leaves})
            raise ValueError(f"{len(differing)} tensors are missing or unexpected, such as {differing[0][:200]}")
        arrays = {name: _array(file, name, leaf) for name, leaf in leaves.items()}
    return jax.tree_util.tree_map_with_path(lambda at, _: arrays[_name(at)], dict(requested))


def _array(file: Any, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    shape = tuple(file.get_slice(name).get_shape())
    if shape != leaf.shape:
        raise ValueError(f"{name} has shape {shape}, not {leaf.shape}")
    array = file.get_tensor(name).astype(leaf.dtype)
    return jax.make_array_from_callback(shape, leaf.sharding, lambda index: array[index])


def _named(trees: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(dict(trees))]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
