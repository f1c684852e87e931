"""Shardings: a mesh (data, fsdp, tensor) and rules over parameter names.

The batch is split over data and fsdp together. Parameters, their average and the optimizer's moments follow the same
rules, because a moment's path ends in its parameter's name: ``tensor`` splits attention heads, hidden units and the
channels between the two convolutions of a residual block; ``fsdp`` splits the largest axis that it divides, or two axes
where it divides none. Small arrays are replicated; gathering them would cost more than it saves.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, cast

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dalle2_jax.errors import ConfigError, UserError
from dalle2_jax.ranges import Range
from dalle2_jax.stages.base import BATCH_AXES
from dalle2_jax.training.configs import HOST
from dalle2_jax.types import Batch

SIZE_FLOOR = 2**14
"""Arrays with fewer elements are replicated."""

TENSOR_RULES = (
    # (pattern over the path, axis from the right that `tensor` splits; a LoRA's factor has it at the same place)
    (r"(^|/)(qkv|q|context_kv)/(kernel|lora_b)$", -2),  # [D, 3, N, K]: heads
    (r"attn\w*/out/(kernel|lora_a)$", -3),  # [N, K, D]: heads
    (r"(^|/)fc/(kernel|lora_b)$", -1),  # [D, 4D]: hidden units
    (r"blocks/proj/(kernel|lora_a)$", -2),  # [4D, D]: hidden units
    (r"(^|/)emb_proj/(kernel|lora_b)$", -1),  # [E, 2C]: scales and shifts of a residual block's channels
)

CONVOLUTION_RULES = (
    # The same for convolutions [H, W, C, D]: the channels within a residual block, as hidden units of an MLP
    (r"(^|/)conv_1/(kernel|lora_b)$", -1),
    (r"(^|/)conv_2/(kernel|lora_a)$", -2),
)


AxisSize = Annotated[int, Range(1, 1_000_000, also=(-1,))]

LOGICAL_AXES = (("batch", BATCH_AXES),)
"""(logical axis in the networks' sharding constraints, the mesh axes over which it is sharded)."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes all remaining devices."""

    data: AxisSize = -1
    fsdp: AxisSize = 1
    tensor: AxisSize = 1


def path_name(path: tuple) -> str:
    """Returns a tree path as "a/b/c"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def make_mesh(config: MeshConfig, local: bool = False) -> Mesh:
    """Returns the mesh over all devices, or over this host's. UserError if the sizes do not fit the device count."""
    sizes = [config.data, config.fsdp, config.tensor]
    devices = jax.local_device_count() if local else jax.device_count()
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh sizes {sizes} must be positive, with at most one -1")
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if -1 in sizes or math.prod(sizes) != devices:
        raise UserError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} does not fit the {devices} device(s) "
            "here: change --config.mesh.* or start on more devices"
        )
    chosen = jax.local_devices() if local else jax.devices()
    return jax.make_mesh(tuple(sizes), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=chosen)


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts that a batch is sharded into."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


@contextlib.contextmanager
def logical_axes(mesh: Mesh) -> Iterator[None]:
    """Maps the logical axes of sharding constraints to ``mesh`` while a program is traced.

    Networks name logical axes ("batch") instead of mesh axes. Outside this context their constraints have no effect.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(LOGICAL_AXES):
        yield


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a value of which every device has a full copy."""
    return NamedSharding(mesh, PartitionSpec())


def partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Returns the partition of an array over single axes of the mesh, from its path and shape."""
    axes: list[str | None] = [None] * len(shape)
    if math.prod(shape) < SIZE_FLOOR:
        return PartitionSpec()
    by_rule = _tensor_axis(name, shape)
    if by_rule is not None and mesh.shape["tensor"] > 1 and shape[by_rule] % mesh.shape["tensor"] == 0:
        axes[by_rule] = "tensor"
    if mesh.shape["fsdp"] > 1:
        for axis in _fsdp_axes(name, shape):
            if axes[axis] is None and shape[axis] % mesh.shape["fsdp"] == 0:
                axes[axis] = "fsdp"
                break
    return PartitionSpec(*axes)


def _rule(rules: tuple[tuple[str, int], ...], name: str) -> int | None:
    return next((axis for pattern, axis in rules if re.search(pattern, name)), None)


def _tensor_axis(name: str, shape: tuple[int, ...]) -> int | None:
    """Returns the axis that ``tensor`` splits; None for an array without one."""
    axis = _rule(TENSOR_RULES + CONVOLUTION_RULES, name)
    return None if axis is None or -axis > len(shape) else axis % len(shape)


def _fsdp_axes(name: str, shape: tuple[int, ...]) -> list[int]:
    """Returns the axes that ``fsdp`` may split, the preferred one first.

    Of a convolution these are the output channels, then the input channels: gathers of other axes compile slowly.
    """
    if name.endswith("/kernel") and len(shape) == 4 and _rule(TENSOR_RULES, name) is None:
        return [3, 2]
    return sorted(range(len(shape)), key=lambda axis: -shape[axis])


def array_sharding(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of an array, from its path and shape.

    It is that of `partition_spec` where ``fsdp`` divides an axis. Elsewhere ``fsdp`` is factored into two axes of a
    finer mesh over the same devices (256 = 128 x 2), which split two axes of the array. If no factors do, the array is
    split over the largest factor that divides an axis.
    """
    spec, size = partition_spec(name, shape, mesh), mesh.shape["fsdp"]
    if "fsdp" in spec or size == 1 or not spec:
        return NamedSharding(mesh, spec)
    free = [axis for axis in _fsdp_axes(name, shape) if spec[axis] is None]
    factors = [factor for factor in range(size - 1, 1, -1) if size % factor == 0]
    for factor in factors:
        for major, minor in itertools.permutations(free, 2):
            if shape[major] % factor == 0 and shape[minor] % (size // factor) == 0:
                return _split(spec, {major: "fsdp", minor: "fsdp_minor"}, mesh, factor)
    for factor, axis in itertools.product(factors, free):
        if shape[axis] % factor == 0:
            return _split(spec, {axis: "fsdp"}, mesh, factor)
    return NamedSharding(mesh, spec)


def _split(spec: PartitionSpec, names: Mapping[int, str], mesh: Mesh | AbstractMesh, factor: int) -> NamedSharding:
    """Returns the sharding over a finer mesh that also splits axes of the array over mesh axes ``names``."""
    return NamedSharding(_finer(mesh, factor), PartitionSpec(*(names.get(axis, one) for axis, one in enumerate(spec))))


@functools.cache
def _finer(mesh: Mesh | AbstractMesh, factor: int) -> Mesh | AbstractMesh:
    """Returns a mesh over the same devices whose axis ``fsdp`` is (fsdp, fsdp_minor), with ``factor`` of fsdp."""
    data, fsdp, tensor = (mesh.shape[name] for name in ("data", "fsdp", "tensor"))
    sizes, names = (data, factor, fsdp // factor, tensor), ("data", "fsdp", "fsdp_minor", "tensor")
    types = (AxisType.Auto,) * 4
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(sizes, names, axis_types=types)
    return Mesh(mesh.devices.reshape(sizes), names, axis_types=types)


def tree_shardings(abstract: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns a tree of NamedSharding for a tree of shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: array_sharding(path_name(path), leaf.shape, mesh), abstract
    )


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Returns the shapes with their shardings attached, as a target of `Checkpoints.restore`."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract, shardings)


def shard_batch(batch: Mapping[str, Any] | Batch, mesh: Mesh) -> Batch:
    """Copies this process's rows of a global batch to its devices, asynchronously."""
    sharding = batch_sharding(mesh)
    arrays = {
        name: jax.make_array_from_process_local_data(sharding, rows)
        for name, rows in cast(Mapping[str, Any], batch).items()
    }
    return cast(Batch, arrays)


# --- the memory of the host ---------------------------------------------------------------


def check_host_memory(mesh: Mesh, fields: Iterable[str]) -> None:
    """Raises ConfigError for the first of the config fields that need `HOST` memory, if the devices have none.

    Args:
      mesh: of devices.
      fields: dotted names.
    """
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    for field in fields:
        if HOST not in kinds:
            raise ConfigError(
                f"config.{field} needs memory of kind {HOST}, but {device.platform} devices here have "
                f"{' and '.join(kinds)}: use another value",
                field,
            )


def on_devices(tree: Any) -> Any:
    """Returns a tree of arrays with those of host memory copied to their devices, sharded as they are."""

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.sharding.memory_kind != HOST:
            return leaf
        return jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))

    return jax.tree.map(moved, tree)
