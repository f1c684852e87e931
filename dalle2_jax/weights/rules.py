"""Conversion tables between the tensors of a torch checkpoint and the leaves of a Flax parameter tree.

A table is a list of `Rule`. Each rule joins tensors into one leaf and splits the leaf into tensors again, so that one
table serves import (`from_tensors`) and export (`to_tensors`). Loading is strict: `from_tensors` checks that the table
is a bijection, in which every tensor is used once, every leaf is set once and every shape matches.

    rules = [
        *dense("time_mlp/fc_1", "time_embed.0"),
        *norm("ln_final", "final_ln"),
        *stacked(*(
            under("transformer/blocks", f"resblocks.{i}.", [*norm("ln_1", "ln_1"), *dense("fc", "mlp.c_fc")])
            for i in range(layers)
        )),
    ]

Torch stores a dense kernel as [out, in] and a convolution kernel as [out, in, H, W]; Flax stores the outputs last.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dalle2_jax.errors import UserError, WeightsError
from dalle2_jax.types import Params
from dalle2_jax.weights.config_files import named
from dalle2_jax.weights.tensors import Tensor

_MAX_NAMES = 4  # names that an error message lists


class Layout(NamedTuple):
    """The conversion between one or more torch tensors and one Flax array."""

    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray], Sequence[np.ndarray]]


class Rule(NamedTuple):
    """The conversion of one leaf.

    Attributes:
        path: path of the leaf, as in "text/ln_final/scale".
        groups: keys of the leaf's tensors. A stacked leaf has one group per layer, any other leaf has one group.
        layout: how the tensors of a group are joined and split.
        stacked: whether the first axis of the leaf is the layer of a scanned transformer.
    """

    path: str
    groups: tuple[tuple[str, ...], ...]
    layout: Layout
    stacked: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of all tensors of the leaf."""
        return tuple(key for group in self.groups for key in group)


# --- layouts --------------------------------------------------------------------------------


def single(forth: Callable[[np.ndarray], np.ndarray], back: Callable[[np.ndarray], np.ndarray]) -> Layout:
    """Returns the layout of a leaf that is made of one tensor."""
    return Layout(lambda tensors: forth(tensors[0]), lambda leaf: (back(leaf),))


SAME = single(lambda x: x, lambda x: x)
DENSE = single(np.transpose, np.transpose)
"""[out, in] <-> [in, out]."""
POINT = single(lambda x: x[..., 0].T, lambda x: x.T[..., None])
"""A convolution of kernel size 1, [out, in, 1] <-> a dense kernel [in, out]."""
CONV = single(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
"""[out, in, H, W] <-> [H, W, in, out]."""


def leading(axes: int) -> Layout:
    """Returns a layout that removes leading axes of length 1: [1, 1, D] <-> [D] for ``axes`` 2."""
    return single(lambda x: x.reshape(x.shape[axes:]), lambda x: x.reshape((1,) * axes + x.shape))


def positive_std(axes: int) -> Layout:
    """Returns the layout of `leading` for standard deviations.

    Joining raises WeightsError if one is 0, negative or not finite.
    """
    layout = leading(axes)

    def join(tensors: Sequence[np.ndarray]) -> np.ndarray:
        value = layout.join(tensors)
        invalid = ~(np.isfinite(value) & (value > 0))
        if invalid.any():
            count = f"{invalid.sum()} of {invalid.size} standard deviations"
            raise WeightsError(f"{count} are not positive and finite: they were never estimated")
        return value

    return Layout(join, layout.split)


def _rows_first(leaf: np.ndarray, bias: bool) -> np.ndarray:
    """Returns a kernel [D, parts, N, K] as [parts, N, K, D], and a bias, which has no D, unchanged."""
    return leaf if bias else np.moveaxis(leaf, 0, -1)


def fused(parts: int, heads: int, bias: bool = False, heads_first: bool = False, point: bool = False) -> Layout:
    """Returns the layout of fused projections: [parts * N * K, D] <-> [D, parts, N, K]; a bias <-> [parts, N, K].

    Args:
        parts: 3 for queries, keys and values; 2 for keys and values.
        heads: number of heads N.
        bias: whether the leaf is a bias.
        heads_first: whether the rows are ordered (head, part, K) instead of (part, head, K).
        point: whether the tensor is a convolution of kernel size 1, [rows, D, 1].
    """

    def forth(x: np.ndarray) -> np.ndarray:
        x = x[..., 0] if point and not bias else x
        order = (heads, parts) if heads_first else (parts, heads)
        x = x.reshape(*order, x.shape[0] // (parts * heads), *x.shape[1:])
        x = x.swapaxes(0, 1) if heads_first else x
        return x if bias else np.moveaxis(x, -1, 0)

    def back(leaf: np.ndarray) -> np.ndarray:
        x = _rows_first(leaf, bias)
        x = x.swapaxes(0, 1) if heads_first else x
        x = x.reshape(-1, *x.shape[3:])
        return x[..., None] if point and not bias else x

    return single(forth, back)


def separate(heads: int, bias: bool = False) -> Layout:
    """Returns the layout of one tensor [N * K, D] per projection <-> [D, parts, N, K]; biases <-> [parts, N, K]."""

    def join(tensors: Sequence[np.ndarray]) -> np.ndarray:
        x = np.stack([x.reshape(heads, x.shape[0] // heads, *x.shape[1:]) for x in tensors])
        return x if bias else np.moveaxis(x, -1, 0)

    def split(leaf: np.ndarray) -> Sequence[np.ndarray]:
        return tuple(x.reshape(-1, *x.shape[2:]) for x in _rows_first(leaf, bias))

    return Layout(join, split)


def merged_heads(heads: int, point: bool = False) -> Layout:
    """Returns the layout of an attention's output kernel: [D, N * K] <-> [N, K, D]; ``point`` as for `fused`."""

    def forth(x: np.ndarray) -> np.ndarray:
        x = (x[..., 0] if point else x).T
        return x.reshape(heads, x.shape[0] // heads, x.shape[1])

    def back(leaf: np.ndarray) -> np.ndarray:
        x = leaf.reshape(-1, leaf.shape[-1]).T
        return x[..., None] if point else x

    return single(forth, back)


# --- rules ----------------------------------------------------------------------------------


def leaf(path: str, key: str, layout: Layout = SAME) -> list[Rule]:
    """Returns the rule of a leaf that is made of one tensor."""
    return [Rule(path, ((key,),), layout)]


def dense(path: str, key: str, layout: Layout = DENSE, bias: bool = True) -> list[Rule]:
    """Returns the rules of a layer with a kernel of the given layout and, if ``bias``, a bias."""
    kernel = leaf(f"{path}/kernel", f"{key}.weight", layout)
    return kernel + (leaf(f"{path}/bias", f"{key}.bias") if bias else [])


def conv(path: str, key: str, bias: bool = True) -> list[Rule]:
    """Returns the rules of a 2-D convolution."""
    return dense(path, key, CONV, bias)


def norm(path: str, key: str) -> list[Rule]:
    """Returns the rules of a layer or group normalisation."""
    return [*leaf(f"{path}/scale", f"{key}.weight"), *leaf(f"{path}/bias", f"{key}.bias")]


def projections(path: str, keys: Sequence[str], heads: int, **packing: Any) -> list[Rule]:
    """Returns the rules of an attention's input projections: `separate` for several keys, `fused` for one."""
    layouts = [
        separate(heads, bias) if len(keys) > 1 else fused(heads=heads, bias=bias, **packing) for bias in (False, True)
    ]
    names = ("kernel", "weight"), ("bias", "bias")
    return [
        Rule(f"{path}/{ours}", (tuple(f"{key}.{theirs}" for key in keys),), layout)
        for (ours, theirs), layout in zip(names, layouts, strict=True)
    ]


def constant(path: str, value: float) -> list[Rule]:
    """Returns the rule of a scalar that the checkpoint does not contain; export omits it."""
    return [Rule(path, ((),), Layout(lambda _: np.asarray(value, np.float32), lambda _: ()))]


def under(path: str, key: str, rules: Iterable[Rule]) -> list[Rule]:
    """Returns the rules with ``path/`` before each path and ``key`` (which includes its dot) before each key."""
    return [
        rule._replace(
            path=f"{path}/{rule.path}" if path else rule.path,
            groups=tuple(tuple(f"{key}{name}" for name in group) for group in rule.groups),
        )
        for rule in rules
    ]


def stacked(*layers: Iterable[Rule]) -> list[Rule]:
    """Merges the rules of equal layers: one rule per path, whose leaf has the layers as its first axis."""
    table: dict[str, Rule] = {}
    for layer in layers:
        for rule in layer:
            before = table[rule.path].groups if rule.path in table else ()
            table[rule.path] = rule._replace(groups=before + rule.groups, stacked=True)
    return list(table.values())


# --- applying a table -----------------------------------------------------------------------


def from_tensors(
    rules: Sequence[Rule],
    tensors: Mapping[str, Tensor],
    abstract: Params,
    where: str,
    ignored: Sequence[str] = (),
    dtype: Any = np.float32,
) -> Params:
    """Reads a checkpoint into a parameter tree, one tensor at a time.

    Args:
        rules: the table.
        tensors: the checkpoint's tensors, by key.
        abstract: tree of the shapes to fill.
        where: name of the checkpoint, for errors.
        ignored: regular expressions of keys that are skipped on purpose.
        dtype: dtype of the leaves.

    Returns:
        A tree of numpy arrays with the structure and shapes of ``abstract``.

    Raises:
        WeightsError: a tensor is missing, unexpected or of another shape, or a leaf has no rule.
    """
    shapes = {_path(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    check(rules, tensors, shapes, where, ignored)
    tree: dict[str, Any] = {}
    for rule in rules:
        *parents, name = rule.path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = _read_leaf(rule, tensors, shapes[rule.path], dtype)
    return tree


def check_keys(rules: Sequence[Rule], tensors: Mapping[str, Any], where: str, ignored: Sequence[str] = ()) -> list[str]:
    """Checks a checkpoint's keys against a table, and returns the keys of the table.

    Raises:
        WeightsError: keys are missing or unexpected.
    """
    keys = [key for rule in rules for key in rule.keys]
    known = set(keys)
    missing = [key for key in keys if key not in tensors]
    unexpected = [key for key in tensors if key not in known and not any(re.fullmatch(form, key) for form in ignored)]
    if missing:
        what = f"{where} lacks {_list('tensor', missing)}"
        raise WeightsError(f"{what}: the file is cut short or of another family", where, missing, unexpected)
    if unexpected:
        what = f"{where} has unexpected {_list('tensor', unexpected)}"
        raise WeightsError(f"{what}: the file is of another family", where, missing, unexpected)
    return keys


def check(
    rules: Sequence[Rule], tensors: Mapping[str, Any], paths: Iterable[str], where: str, ignored: Sequence[str] = ()
) -> None:
    """Checks that a table is a bijection between a checkpoint's keys and the paths of a tree.

    Raises:
        WeightsError: keys are missing or unexpected, or the checkpoint has no tensors for a path.
        AssertionError: the table uses a key or a path twice, or a path that the tree does not have.
    """
    keys = check_keys(rules, tensors, where, ignored)
    table, leaves = [rule.path for rule in rules], set(paths)
    missing = sorted(leaves.difference(table))
    if missing:
        raise WeightsError(f"{where} has no tensors for {_list('parameter', missing)}", where, missing)
    if not len({*table}) == len(table) == len(leaves) or len({*keys}) < len(keys):
        raise AssertionError(f"the table of {where} is not a bijection")


def to_tensors(rules: Sequence[Rule], params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the (key, tensor) pairs of a parameter tree, one tensor at a time: the inverse of `from_tensors`."""
    leaves = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for rule in rules:
        value = np.asarray(leaves[rule.path])
        for i, group in enumerate(rule.groups):
            yield from zip(group, rule.layout.split(value[i] if rule.stacked else value), strict=True)


def shapes(rules: Sequence[Rule], params: Params) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that `to_tensors` yields for a tree of arrays or of shapes, by key."""
    # Broadcast zeros take no memory: layouts reshape and transpose without copying.
    hollow = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), np.float32), leaf.shape), params)
    return {key: value.shape for key, value in to_tensors(rules, hollow)}


def _read_leaf(rule: Rule, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    expected = shape[1:] if rule.stacked else shape
    for group in filter(None, rule.groups):  # checked before memory is allocated
        if sum(math.prod(tensors[key].shape) for key in group) != math.prod(expected):
            raise _shape_error(group, rule, tensors, expected)
    value = np.empty(shape, dtype)
    for i, group in enumerate(rule.groups):
        try:
            part = rule.layout.join([tensors[key].read() for key in group])
        except ValueError:  # the layout cannot reshape these tensors
            part = None
        except UserError as error:
            file = tensors[group[0]].file
            raise WeightsError(f"{file}: {named(group[0])}: {error}", file) from error
        if part is None or part.shape != expected:
            raise _shape_error(group, rule, tensors, expected)
        value[i if rule.stacked else ...] = part
    return value


def _shape_error(
    group: Sequence[str], rule: Rule, tensors: Mapping[str, Tensor], expected: tuple[int, ...]
) -> WeightsError:
    given = ", ".join(f"{named(key)} {list(tensors[key].shape)}" for key in group)
    file = tensors[group[0]].file
    return WeightsError(f"{file}: {given} does not match {rule.path} {list(expected)}", file)


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _list(what: str, names: Sequence[str]) -> str:
    listed = ", ".join(map(named, names[:_MAX_NAMES]))
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"{what}{'s' if len(names) > 1 else ''} {listed}{more}"
