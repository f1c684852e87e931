"""Shardings: a mesh (data, fsdp, tensor) and rules over parameter names.

The batch is split over data and fsdp together. Parameters, their average and the optimizer's moments follow the same
rules, because a moment's path ends in its parameter's name: ``tensor`` splits attention heads and hidden units,
``fsdp`` the largest axis that it divides. Small arrays are replicated; gathering them would cost more than it saves.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, cast

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dalle2_jax.errors import UserError
from dalle2_jax.ranges import Range
from dalle2_jax.training.optim import path_name
from dalle2_jax.types import Batch

SIZE_FLOOR = 2**14
"""Arrays with fewer elements are replicated."""

TENSOR_RULES = (
    # (pattern over the path, axis from the right that `tensor` splits; a LoRA's factor has it at the same place)
    (r"(^|/)(qkv|q|context_kv)/(kernel|lora_b)$", -2),  # [D, 3, N, K]: heads
    (r"attn\w*/out/(kernel|lora_a)$", -3),  # [N, K, D]: heads
    (r"(^|/)fc/(kernel|lora_b)$", -1),  # [D, 4D]: hidden units
    (r"blocks/proj/(kernel|lora_a)$", -2),  # [4D, D]: hidden units
)


AxisSize = Annotated[int, Range(1, 1_000_000, also=(-1,))]

LOGICAL_AXES = (("batch", ("data", "fsdp")),)
"""(logical axis in the networks' sharding constraints, the mesh axes over which it is sharded)."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes all remaining devices."""

    data: AxisSize = -1
    fsdp: AxisSize = 1
    tensor: AxisSize = 1


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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


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


def partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns the partition of an array, from its path and shape."""
    axes: list[str | None] = [None] * len(shape)
    if math.prod(shape) < SIZE_FLOOR:
        return PartitionSpec()
    by_rule = next((axis for pattern, axis in TENSOR_RULES if re.search(pattern, name)), None)
    if by_rule is not None and mesh.shape["tensor"] > 1 and shape[by_rule] % mesh.shape["tensor"] == 0:
        axes[by_rule % len(shape)] = "tensor"
    if mesh.shape["fsdp"] > 1:
        # A convolution is split on its output channels only: gathers of the other axes compile slowly.
        convolution = by_rule is None and name.endswith("/kernel") and len(shape) == 4
        candidates = [len(shape) - 1] if convolution else sorted(range(len(shape)), key=lambda i: -shape[i])
        for axis in candidates:
            if axes[axis] is None and shape[axis] % mesh.shape["fsdp"] == 0:
                axes[axis] = "fsdp"
                break
    return PartitionSpec(*axes)


def tree_shardings(abstract: Any, mesh: Mesh) -> Any:
    """Returns a tree of NamedSharding for a tree of shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_name(path), leaf.shape, mesh)), abstract
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
