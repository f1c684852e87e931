"""The language of rename tables: which tensors of a torch checkpoint make which leaf, and the way back.

A table is a list of `Rule`. Each says how one leaf of our tree is joined from tensors and split into them again, so
that one table serves import and export; `fill` and `empty` apply a table and check that it is a bijection: every
tensor is consumed, every leaf filled, every shape equal.

    rules = [
        *dense("time_mlp/fc_1", "time_embed.0"),
        *norm("ln_final", "final_ln"),
        *stacked(*(
            under("transformer/blocks", f"resblocks.{i}.", [*norm("ln_1", "ln_1"), *dense("fc", "mlp.c_fc")])
            for i in range(layers)
        )),
    ]

Torch keeps a dense kernel as [out, in] and a convolution's as [out, in, height, width]; Flax has the outputs last.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dalle2_jax.types import Params, UserError
from dalle2_jax.weights.tensors import Tensor

_NAMED = 4  # keys that an error spells out


class Layout(NamedTuple):
    """How some tensors of torch's lie as one array of ours, and back."""

    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray], Sequence[np.ndarray]]


class Rule(NamedTuple):
    """One leaf: its path ("text/ln_final/scale"), its tensors' keys, and their layout.

    A leaf of a scanned transformer is stacked: it has a group of keys for each layer, its first axis.
    """

    path: str
    groups: tuple[tuple[str, ...], ...]
    layout: Layout
    stacked: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """All its tensors' keys."""
        return tuple(key for group in self.groups for key in group)


# --- layouts --------------------------------------------------------------------------------


def one(forth: Callable[[np.ndarray], np.ndarray], back: Callable[[np.ndarray], np.ndarray]) -> Layout:
    """A layout of a single tensor."""
    return Layout(lambda tensors: forth(tensors[0]), lambda leaf: (back(leaf),))


SAME = one(lambda x: x, lambda x: x)
DENSE = one(np.transpose, np.transpose)
"""[out, in] <-> [in, out]."""
POINT = one(lambda x: x[..., 0].T, lambda x: x.T[..., None])
"""A convolution of one position [out, in, 1] <-> a dense kernel [in, out]."""
CONV = one(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
"""[out, in, H, W] <-> [H, W, in, out]."""


def leading(axes: int) -> Layout:
    """Axes of length 1 before those of the leaf: [1, 1, D] <-> [D] for two of them."""
    return one(lambda x: x.reshape(x.shape[axes:]), lambda x: x.reshape((1,) * axes + x.shape))


def _rows_first(leaf: np.ndarray, bias: bool) -> np.ndarray:
    """[D, parts, N, K] -> [parts, N, K, D]; a bias has no D."""
    return leaf if bias else np.moveaxis(leaf, 0, -1)


def fused(parts: int, heads: int, bias: bool = False, heads_first: bool = False, point: bool = False) -> Layout:
    """Queries, keys and values in one tensor [parts * N * K, D] <-> [D, parts, N, K]; its bias <-> [parts, N, K].

    Args:
        parts: 3, or 2 for keys and values alone.
        heads: N.
        bias: whether this is the bias.
        heads_first: whether the rows are N heads of (q, k, v) instead of three times N heads.
        point: whether the tensor is a convolution of one position, [rows, D, 1].
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

    return one(forth, back)


def separate(heads: int, bias: bool = False) -> Layout:
    """Queries, keys and values in a tensor each, [N * K, D] <-> [D, parts, N, K]; biases <-> [parts, N, K]."""

    def join(tensors: Sequence[np.ndarray]) -> np.ndarray:
        x = np.stack([x.reshape(heads, x.shape[0] // heads, *x.shape[1:]) for x in tensors])
        return x if bias else np.moveaxis(x, -1, 0)

    def split(leaf: np.ndarray) -> Sequence[np.ndarray]:
        return tuple(x.reshape(-1, *x.shape[2:]) for x in _rows_first(leaf, bias))

    return Layout(join, split)


def merged_heads(heads: int, point: bool = False) -> Layout:
    """The kernel after attention, [D, N * K] (with a last axis of 1 if ``point``) <-> [N, K, D]."""

    def forth(x: np.ndarray) -> np.ndarray:
        x = (x[..., 0] if point else x).T
        return x.reshape(heads, x.shape[0] // heads, x.shape[1])

    def back(leaf: np.ndarray) -> np.ndarray:
        x = leaf.reshape(-1, leaf.shape[-1]).T
        return x[..., None] if point else x

    return one(forth, back)


# --- rules ----------------------------------------------------------------------------------


def leaf(path: str, key: str, layout: Layout = SAME) -> list[Rule]:
    """A leaf of one tensor."""
    return [Rule(path, ((key,),), layout)]


def dense(path: str, key: str, layout: Layout = DENSE, bias: bool = True) -> list[Rule]:
    """A dense layer, or whatever has a kernel of that ``layout`` and a bias."""
    kernel = leaf(f"{path}/kernel", f"{key}.weight", layout)
    return kernel + (leaf(f"{path}/bias", f"{key}.bias") if bias else [])


def conv(path: str, key: str, bias: bool = True) -> list[Rule]:
    """A convolution over pictures."""
    return dense(path, key, CONV, bias)


def norm(path: str, key: str) -> list[Rule]:
    """A layer or group norm."""
    return [*leaf(f"{path}/scale", f"{key}.weight"), *leaf(f"{path}/bias", f"{key}.bias")]


def projections(path: str, keys: Sequence[str], heads: int, **packing: Any) -> list[Rule]:
    """The projections before attention: several keys are ``separate``, one is ``fused`` as ``packing`` says."""
    layouts = [separate(heads, bias) if len(keys) > 1 else fused(heads=heads, bias=bias, **packing) for bias in (0, 1)]
    names = ("kernel", "weight"), ("bias", "bias")
    return [
        Rule(f"{path}/{ours}", (tuple(f"{key}.{theirs}" for key in keys),), layout)
        for (ours, theirs), layout in zip(names, layouts, strict=True)
    ]


def constant(path: str, value: float) -> list[Rule]:
    """A scalar that the checkpoint lacks; the way back drops it."""
    return [Rule(path, ((),), Layout(lambda _: np.asarray(value, np.float32), lambda _: ()))]


def under(path: str, key: str, rules: Iterable[Rule]) -> list[Rule]:
    """The rules with ``path/`` before each path and ``key`` (with its dot) before each key."""
    return [
        rule._replace(
            path=f"{path}/{rule.path}" if path else rule.path,
            groups=tuple(tuple(f"{key}{name}" for name in group) for group in rule.groups),
        )
        for rule in rules
    ]


def stacked(*layers: Iterable[Rule]) -> list[Rule]:
    """The rules of equal layers as one rule a path, whose leaf has the layers as its first axis."""
    table: dict[str, Rule] = {}
    for layer in layers:
        for rule in layer:
            before = table[rule.path].groups if rule.path in table else ()
            table[rule.path] = rule._replace(groups=before + rule.groups, stacked=True)
    return list(table.values())


# --- applying a table -----------------------------------------------------------------------


def fill(
    rules: Sequence[Rule],
    tensors: Mapping[str, Tensor],
    abstract: Params,
    where: str,
    ignored: Sequence[str] = (),
    dtype: Any = np.float32,
) -> Params:
    """Reads a checkpoint into our tree, a tensor at a time.

    Args:
        rules: the table.
        tensors: what the checkpoint holds, by key.
        abstract: our tree's shapes.
        where: the checkpoint's name, for errors.
        ignored: regular expressions of keys that are left out deliberately.
        dtype: of the leaves.

    Raises:
        UserError: a tensor missing, left over or of another shape, a leaf that no rule fills.
    """
    shapes = {_path(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    check(rules, tensors, shapes, where, ignored)
    tree: dict[str, Any] = {}
    for rule in rules:
        *parents, name = rule.path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = _joined(rule, tensors, shapes[rule.path], dtype)
    return tree


def check(
    rules: Sequence[Rule], tensors: Mapping[str, Any], paths: Iterable[str], where: str, ignored: Sequence[str] = ()
) -> None:
    """Checks a table's bijection between keys and paths.

    Raises:
        UserError: naming what is missing or left over.
    """
    wanted = [key for rule in rules for key in rule.keys]
    given = set(wanted)
    missing = [key for key in wanted if key not in tensors]
    left = [key for key in tensors if key not in given and not any(re.fullmatch(form, key) for form in ignored)]
    if missing:
        raise UserError(f"{where} lacks {_some('tensor', missing)}: it is cut short or of another family")
    if left:
        raise UserError(f"{where} has {_some('tensor', left)} with no place here: it is of another family")
    filled, leaves = [rule.path for rule in rules], set(paths)
    unfilled = sorted(leaves - set(filled))
    if unfilled:
        raise UserError(f"{where} says nothing of {_some('parameter', unfilled)}")
    if len(set(filled)) < len(filled) or len(given) < len(wanted) or set(filled) - leaves:
        raise AssertionError(f"the table of {where} is no bijection")


def empty(rules: Sequence[Rule], params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yields a tree's tensors by their keys, the inverse of ``fill``, a tensor at a time."""
    leaves = {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for rule in rules:
        value = np.asarray(leaves[rule.path])
        for i, group in enumerate(rule.groups):
            yield from zip(group, rule.layout.split(value[i] if rule.stacked else value), strict=True)


def shapes(rules: Sequence[Rule], params: Params) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that ``empty`` would yield of a tree, or of a tree of shapes."""
    # a zero that is broadcast: no layout copies it
    hollow = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), np.float32), leaf.shape), params)
    return {key: value.shape for key, value in empty(rules, hollow)}


def _joined(rule: Rule, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    whole = np.empty(shape, dtype)
    for i, group in enumerate(rule.groups):
        expected = shape[1:] if rule.stacked else shape
        try:
            part = rule.layout.join([tensors[key].read() for key in group])
        except ValueError:  # it cannot even be laid out so
            part = None
        if part is None or part.shape != expected:
            got = ", ".join(f"{key} {list(tensors[key].shape)}" for key in group)
            raise UserError(f"{tensors[group[0]].file}: {got} does not fit {rule.path} {list(expected)}")
        if rule.stacked:
            whole[i] = part
        else:
            whole[...] = part
    return whole


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _some(what: str, names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{what}{'s' if len(names) > 1 else ''} {shown}{more}"
