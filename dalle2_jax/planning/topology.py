"""Devices to compile for, without the devices: TPU slices, clusters of GPUs, or any number of CPU devices.

A topology's name is CHIP:SHAPE: a TPU and the shape of its slice (v5p:8x8x8), a GPU and hosts x GPUs of a host
(h200:2x8), or cpu and a number of devices (cpu:8). TPUs need the package libtpu and GPUs the CUDA plugin of JAX, but no
accelerator; cpu needs neither, has the same shardings, and no figures for time.
"""

import dataclasses
import functools
import importlib.util
import itertools
import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh
from jaxlib import xla_client

from dalle2_jax.errors import ConfigError, UsageError, shown
from dalle2_jax.planning.chips import CHIPS, Chip
from dalle2_jax.training.sharding import MeshConfig

MAX_CPU_DEVICES = 512

AXES = ("data", "fsdp", "tensor")

EXTRAS = {"tpu": ("libtpu", "tpu"), "cuda": ("jax_plugins.xla_cuda12", "cuda")}
"""Platform -> (the module of its compiler, the extra of this package that installs it)."""

TPU_FILES = ("/dev/accel0", "/dev/vfio/0")
"""Files of which a machine with a TPU has one."""

WITHOUT_TPU = {
    # libtpu would ask a metadata server which TPU this is, lock it, and complain that there is none
    **{"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    **{"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"},
    **{"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"},
}
"""Environment of libtpu on a machine without a TPU."""


class MissingCompiler(UsageError):
    """The compiler for a kind of accelerator is not installed.

    Attributes:
      extra: the extra of this package that installs it.
    """

    def __init__(self, message: str, extra: str):
        super().__init__(message)
        self.extra = extra


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: CHIP:SHAPE.
      chip: the accelerator; None for CPU devices.
      devices: in the order of hosts.
    """

    name: str
    chip: Chip | None
    devices: tuple[Any, ...]

    def mesh(self, sizes: tuple[int, int, int]) -> Mesh:
        """Returns the mesh (data, fsdp, tensor) of these sizes; neighbours on it are neighbours in the network.

        Raises:
          ConfigError: the slice cannot be divided into these sizes, as 16x16x24 into 2,048 times 3.
        """
        if self.chip is not None and self.chip.platform == "tpu":
            try:
                devices = mesh_utils.create_device_mesh(sizes, list(self.devices))
            except NotImplementedError as error:
                mesh = shown_mesh(sizes)
                message = f"{self.name} cannot be divided into the mesh {mesh}: give products of its sides"
                raise ConfigError(message, "mesh") from error
        else:
            devices = np.array(self.devices).reshape(sizes)
        return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def shown_mesh(sizes: Iterable[int], separator: str = ",") -> str:
    """Returns the sizes (data, fsdp, tensor) of a mesh as in "data=1,fsdp=8,tensor=1", which --mesh takes."""
    return separator.join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))


def topology_names() -> list[str]:
    """Returns the names of all topologies of accelerators."""
    return [name for chip in CHIPS.values() for name in chip.topologies]


def check_name(name: str) -> tuple[Chip | None, str]:
    """Returns the chip and the shape of a topology's name; imports no compiler.

    Raises:
      UsageError: there is no such topology; the message lists those that there are.
    """
    kind, _, shape = name.partition(":")
    if kind == "cpu":
        if not (shape.isascii() and shape.isdigit() and len(shape) < 5 and 1 <= int(shape) <= MAX_CPU_DEVICES):
            raise UsageError(f"unknown topology {shown(name)}: cpu:N has N from 1 to {MAX_CPU_DEVICES} devices")
        return None, shape
    if kind not in CHIPS:
        raise UsageError(
            f"unknown topology {shown(name)}: choose a chip from {', '.join(CHIPS)}, as in v5e:4x4, or cpu:8"
        )
    if shape not in CHIPS[kind].shapes:
        raise UsageError(f"unknown topology {shown(name)}: choose from {', '.join(CHIPS[kind].topologies)}")
    return CHIPS[kind], shape


@functools.lru_cache(maxsize=32)
def find_topology(name: str) -> Topology:
    """Returns the topology of this name.

    Raises:
      MissingCompiler: its compiler is not installed.
      UsageError: as `check_name`.
    """
    chip, shape = check_name(name)
    if chip is None:
        client = xla_client.make_cpu_client(num_devices=int(shape))
        return Topology(name, None, tuple(client.devices()))
    module, extra = EXTRAS[chip.platform]
    if not _installed(module):
        raise MissingCompiler(
            f"{name} is compiled by {module.split('.')[-1]}, which is not installed: "
            f"pip install 'dalle2_jax[{extra}]'; cpu:8 needs nothing",
            extra,
        )
    devices = _tpu_devices(name, chip) if chip.platform == "tpu" else _gpu_devices(chip, shape)
    return Topology(name, chip, tuple(devices))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its package
        return False


def _tpu_devices(name: str, chip: Chip) -> Any:
    if not any(map(os.path.exists, TPU_FILES)):
        for variable, value in WITHOUT_TPU.items():
            os.environ.setdefault(variable, value)
    options = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    return topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices


def _gpu_devices(chip: Chip, shape: str) -> Any:
    hosts, per_host = shape.split("x")
    config = _HOPPER.format(name=chip.name.upper(), memory=chip.memory, bandwidth=int(chip.memory_bandwidth))
    return topologies.get_topology_desc(
        topology_name=chip.name, platform="cuda", target_config=config, topology=f"1x{hosts}x{per_host}"
    ).devices


_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "NVIDIA {name}"
  driver_version: "12.9.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "NVIDIA {name}"
"""
"""XLA's description of a Hopper GPU (CUDA C++ programming guide, compute capability 9.0)."""


# --- meshes ---------------------------------------------------------------------------------


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Returns the sizes (data, fsdp, tensor) of a mesh on this many devices; a size of -1 takes those that are left.

    Raises:
      ConfigError: they do not fit; the message offers the nearest mesh that does.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if -1 in sizes or math.prod(sizes) != devices:
        named, offered = shown_mesh(sizes, " "), shown_mesh(nearest_mesh(sizes, devices))
        raise ConfigError(
            f"mesh {named} does not fit {devices} devices: the nearest that does is --mesh {offered}", "mesh"
        )
    return sizes[0], sizes[1], sizes[2]


def nearest_mesh(sizes: list[int], devices: int) -> tuple[int, int, int]:
    """Returns the mesh of exactly this many devices whose sizes differ least, as ratios; -1 may be any size."""
    return min(all_meshes(devices), key=lambda mesh: _distance(mesh, sizes))


def _distance(mesh: tuple[int, ...], sizes: list[int]) -> float:
    return sum(abs(math.log(one / other)) for one, other in zip(mesh, sizes, strict=True) if other != -1)


def all_meshes(devices: int) -> list[tuple[int, int, int]]:
    """Returns every (data, fsdp, tensor) whose product is this number of devices."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    pairs = itertools.product(divisors, divisors)
    return [(devices // (fsdp * tensor), fsdp, tensor) for fsdp, tensor in pairs if devices % (fsdp * tensor) == 0]
