"""Conversion tables: each layout against its formula, and the bijection."""

import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import WeightsError
from dalle2_jax.weights.rules import (
    CONV,
    DENSE,
    POINT,
    SAME,
    Rule,
    check,
    constant,
    conv,
    dense,
    from_tensors,
    fused,
    leading,
    leaf,
    merged_heads,
    norm,
    projections,
    separate,
    shapes,
    stacked,
    to_tensors,
    under,
)
from dalle2_jax.weights.tensors import Tensor


def random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def listed(arrays):
    """Returns arrays as the tensors of a file."""
    file = Path("some.safetensors")
    return {key: Tensor(value.shape, "float32", file, lambda value=value: value) for key, value in arrays.items()}


def tree_of(shapes_by_path):
    """Returns a tree of shapes."""
    tree = {}
    for path, shape in shapes_by_path.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


def converted(rules, arrays, sizes, **options):
    return from_tensors(rules, listed(arrays), tree_of(sizes), "some.safetensors", **options)


# --- layouts --------------------------------------------------------------------------------

D, N, K, E = 5, 2, 3, 4
X = random(7, D)
IMAGE = random(2, 6, 5, 3)


def test_a_dense_kernel_is_a_matrix_product():
    weight = random(E, D)
    np.testing.assert_allclose(X @ DENSE.join([weight]), np.einsum("bd,ed->be", X, weight), rtol=1e-5)
    np.testing.assert_allclose(X @ POINT.join([weight[..., None]]), np.einsum("bd,ed->be", X, weight), rtol=1e-5)


def test_a_convolution():
    """One output is the sum over rows, columns and channels of torch's kernel [out, in, row, column]."""
    weight = random(E, 3, 3, 3)
    out = jax.lax.conv_general_dilated(
        IMAGE, CONV.join([weight]), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    by_hand = np.einsum("brck,okrc->bo", IMAGE[:, 1:4, 2:5], weight)
    np.testing.assert_allclose(out[:, 1, 2], by_hand, rtol=1e-4, atol=1e-5)


def heads_of(parts, order):
    """Returns the outputs [B, rows] of a fused projection as heads, by the order of its rows."""
    return np.einsum(f"b{order}->bpnk", parts)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("point", [False, True])
@pytest.mark.parametrize("parts", [2, 3])
def test_fused_projections(parts, heads_first, point):
    weight, bias = random(parts * N * K, D), random(parts * N * K, seed=1)
    shape, order = ((N, parts, K), "npk") if heads_first else ((parts, N, K), "pnk")
    theirs = heads_of((X @ weight.T + bias).reshape(-1, *shape), order)
    options = {"heads_first": heads_first, "point": point}
    kernel = fused(parts, N, **options).join([weight[..., None] if point else weight])
    ours = np.einsum("bd,dpnk->bpnk", X, kernel) + fused(parts, N, bias=True, **options).join([bias])
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_separate_projections():
    weights, biases = [random(N * K, D, seed=i) for i in range(3)], [random(N * K, seed=i) for i in range(3)]
    theirs = [(X @ w.T + b).reshape(-1, N, K) for w, b in zip(weights, biases, strict=True)]
    ours = np.einsum("bd,dpnk->bpnk", X, separate(N).join(weights)) + separate(N, bias=True).join(biases)
    np.testing.assert_allclose(ours, np.stack(theirs, axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("point", [False, True])
def test_heads_merge_after_attention(point):
    weight, heads = random(D, N * K), random(7, N, K)
    kernel = merged_heads(N, point).join([weight[..., None] if point else weight])
    theirs = heads.reshape(7, N * K) @ weight.T
    np.testing.assert_allclose(np.einsum("bnk,nkd->bd", heads, kernel), theirs, rtol=1e-4, atol=1e-5)


LAYOUTS = {
    "same": (SAME, [(2, 3)]),
    "dense": (DENSE, [(4, 5)]),
    "point": (POINT, [(4, 5, 1)]),
    "conv": (CONV, [(4, 5, 3, 2)]),
    "leading": (leading(2), [(1, 1, 5)]),
    "fused": (fused(3, N), [(18, 5)]),
    "fused bias": (fused(3, N, bias=True), [(18,)]),
    "heads first": (fused(3, N, heads_first=True), [(18, 5)]),
    "heads first bias": (fused(3, N, bias=True, heads_first=True), [(18,)]),
    "fused point": (fused(2, N, heads_first=True, point=True), [(12, 5, 1)]),
    "separate": (separate(N), [(6, 5)] * 3),
    "separate bias": (separate(N, bias=True), [(6,)] * 3),
    "merged": (merged_heads(N), [(5, 6)]),
    "merged point": (merged_heads(N, point=True), [(5, 6, 1)]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_splitting_undoes_joining(name):
    layout, sizes = LAYOUTS[name]
    tensors = [random(*shape, seed=i) for i, shape in enumerate(sizes)]
    again = layout.split(layout.join(tensors))
    assert len(again) == len(tensors)
    for ours, theirs in zip(again, tensors, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- tables ---------------------------------------------------------------------------------

LAYERS = 2
TABLE = [
    *dense("head", "out"),
    *leaf("table", "emb.weight"),
    *stacked(
        *(
            under(
                "blocks",
                f"layer.{i}.",
                [*norm("ln", "norm"), *projections("qkv", ["q", "k", "v"], N), *conv("conv", "c", bias=False)],
            )
            for i in range(LAYERS)
        )
    ),
]
SIZES = {
    "head/kernel": (5, 4),
    "head/bias": (4,),
    "table": (9, 5),
    "blocks/ln/scale": (2, 5),
    "blocks/ln/bias": (2, 5),
    "blocks/qkv/kernel": (2, 5, 3, N, K),
    "blocks/qkv/bias": (2, 3, N, K),
    "blocks/conv/kernel": (2, 3, 3, 5, 5),
}
LAYER = {"norm.weight": (5,), "norm.bias": (5,), "c.weight": (5, 5, 3, 3)} | {
    f"{name}.{kind}": shape for name in "qkv" for kind, shape in (("weight", (6, 5)), ("bias", (6,)))
}
KEYS = {"out.weight": (4, 5), "out.bias": (4,), "emb.weight": (9, 5)} | {
    f"layer.{i}.{key}": shape for i in range(LAYERS) for key, shape in LAYER.items()
}


def arrays():
    return {key: random(*shape, seed=i) for i, (key, shape) in enumerate(KEYS.items())}


def test_shapes_of_the_tensors_of_a_tree():
    assert shapes(TABLE, tree_of(SIZES)) == KEYS


def test_export_inverts_import():
    given = arrays()
    tree = converted(TABLE, given, SIZES)
    np.testing.assert_array_equal(tree["blocks"]["ln"]["scale"][1], given["layer.1.norm.weight"])
    np.testing.assert_array_equal(tree["blocks"]["qkv"]["bias"][1, 2], given["layer.1.v.bias"].reshape(N, K))
    again = dict(to_tensors(TABLE, tree))
    assert again.keys() == given.keys()
    for key, value in again.items():
        np.testing.assert_array_equal(value, given[key])


def test_leaves_of_half_precision():
    tree = converted(TABLE, arrays(), SIZES, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.bfloat16)}


def test_only_the_tensors_of_one_layer_are_in_memory():
    """The tensors of a group are released before the next group is read."""
    alive, maximum = set(), 0

    def reader(key, value):
        def read():
            nonlocal maximum
            copy = value.view(np.ndarray).copy().view(Watched)
            alive.add(key)
            weakref.finalize(copy, alive.discard, key)
            maximum = max(maximum, len(alive))
            return copy

        return read

    tensors = {key: tensor._replace(read=reader(key, arrays()[key])) for key, tensor in listed(arrays()).items()}
    from_tensors(TABLE, tensors, tree_of(SIZES), "some.safetensors")
    assert maximum == 3 and not alive  # queries, keys and values


class Watched(np.ndarray):
    """An array that can be referenced weakly."""


def test_ignored_keys():
    given = arrays() | {"layer.0.position_ids": random(3), "layer.position": random(3)}
    pattern = r"layer\.\d+\.position_ids"
    error = mentions(unexpected=("layer.position",), path="some.safetensors")
    with pytest.raises(WeightsError, check=error):
        converted(TABLE, given, SIZES, ignored=[pattern])
    del given["layer.position"]
    assert converted(TABLE, given, SIZES, ignored=[pattern])


def test_a_constant_is_set_by_import_and_omitted_by_export():
    tree = converted(constant("scale", 2.5), {}, {"scale": ()})
    assert tree["scale"] == np.float32(2.5)
    assert not [*to_tensors(constant("scale", 2.5), tree)]


# --- mistakes -------------------------------------------------------------------------------


def without(*keys):
    return {key: value for key, value in arrays().items() if key not in keys}


KEY_ERRORS = {
    # arrays: missing and unexpected keys, and how the message lists them
    "one missing": (without("out.bias"), ["out.bias"], [], ["out.bias"]),
    "two missing": (
        without("out.weight", "emb.weight"),
        ["out.weight", "emb.weight"],
        [],
        ["out.weight", "emb.weight"],
    ),
    "all missing": ({}, [*KEYS], [], ["out.weight", "layer.0.norm.weight", "17 more"]),
    "one unexpected": (arrays() | {"extra": random(1)}, [], ["extra"], ["extra"]),
}


@pytest.mark.parametrize("case", KEY_ERRORS)
def test_missing_and_unexpected_keys_are_listed(case):
    given, missing, unexpected, listed = KEY_ERRORS[case]
    with pytest.raises(WeightsError, check=mentions(*listed, path="some.safetensors")) as caught:
        converted(TABLE, given, SIZES)
    assert sorted(caught.value.missing) == sorted(missing) and caught.value.unexpected == tuple(unexpected)


SHAPE_ERRORS = {
    # the tensors and the parameter, as the message mentions them: arrays
    ("out.weight [5, 5]", "head/kernel [5, 4]"): {"out.weight": random(5, 5)},
    ("layer.1.c.weight [5, 5, 3]", "blocks/conv/kernel [3, 3, 5, 5]"): {"layer.1.c.weight": random(5, 5, 3)},
    ("layer.0.k.weight [6, 4]", "layer.0.v.weight [6, 5]", "blocks/qkv/kernel"): {"layer.0.k.weight": random(6, 4)},
    ("emb.weight [5, 9]", "table [9, 5]"): {"emb.weight": random(5, 9)},
}


@pytest.mark.parametrize("facts", SHAPE_ERRORS)
def test_wrong_shapes_are_named(facts):
    with pytest.raises(WeightsError, check=mentions(*facts, path=Path("some.safetensors"))):
        converted(TABLE, arrays() | SHAPE_ERRORS[facts], SIZES)


def test_a_leaf_without_a_rule():
    with pytest.raises(WeightsError, check=mentions("some.safetensors", "bonus", missing=("bonus",))):
        converted(TABLE, arrays(), SIZES | {"bonus": (1,)})


BROKEN = {
    "a leaf set twice": TABLE + leaf("table", "out.weight2"),
    "a tensor used twice": TABLE + leaf("other", "emb.weight"),
    "a leaf that does not exist": TABLE + leaf("nowhere", "more"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_table_must_be_a_bijection(broken):
    keys = {key: () for rule in BROKEN[broken] for key in rule.keys}
    paths = {*SIZES} | ({"other"} if "twice" in broken and "tensor" in broken else set())
    with pytest.raises(AssertionError, match="some.safetensors .*bijection"):
        check(BROKEN[broken], keys, paths, "some.safetensors")
    check(TABLE, KEYS, SIZES, "some.safetensors")


def test_rules_move_under_a_path_and_a_prefix():
    assert under("a/b", "c.", leaf("d", "e")) == [Rule("a/b/d", (("c.e",),), SAME)]
    assert under("", "", leaf("d", "e")) == leaf("d", "e")
