"""Accelerators, with the figures of their datasheets, and the slices and clusters of them that can be named.

| chip | bf16 TFLOP/s | memory      | its bandwidth | links, each way | between hosts | source        |
| ---- | ------------ | ----------- | ------------- | --------------- | ------------- | ------------- |
| v4   | 275          | 32 GiB      | 1,200 GB/s    | 300 GB/s        | -             | [1], [2]      |
| v5e  | 197          | 16 GiB      | 819 GB/s      | 200 GB/s        | -             | [3]           |
| v5p  | 459          | 95 GiB      | 2,765 GB/s    | 600 GB/s        | -             | [4]           |
| v6e  | 918          | 32 GiB      | 1,638 GB/s    | 400 GB/s        | -             | [5]           |
| h100 | 989          | 80 GB       | 3,350 GB/s    | 450 GB/s        | 50 GB/s       | [6], [7]      |
| h200 | 989          | 141 GB      | 4,800 GB/s    | 450 GB/s        | 50 GB/s       | [8], [7]      |

Sources:
  [1] docs.cloud.google.com/tpu/docs/v4.
  [2] Jouppi et al. 2023, arXiv 2304.01433: six links of 50 GB/s a chip.
  [3] docs.cloud.google.com/tpu/docs/v5e: 400 GB/s in both directions together.
  [4] docs.cloud.google.com/tpu/docs/v5p: 1,200 GB/s in both directions together.
  [5] docs.cloud.google.com/tpu/docs/v6e: 800 GB/s in both directions together.
  [6] NVIDIA H100 datasheet, SXM: half of the figures with sparsity.
  [7] NVIDIA DGX H100 and H200 datasheets: 8 GPUs a host, one 400 Gbit/s adapter each; NVLink 900 GB/s both ways.
  [8] NVIDIA H200 datasheet, SXM: half of the figures with sparsity.
"""

import dataclasses

GIB = 2**30

_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_HOSTS = ("1x1", "1x2", "1x4", *(f"{hosts}x8" for hosts in (1, 2, 4, 8, 16, 32, 64, 128, 256)))


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: as in a topology's name.
      platform: of its compiler, "tpu" or "cuda".
      flops: peak of dense bfloat16 matrix products, FLOP/s.
      memory: bytes.
      memory_bandwidth: bytes/s.
      link_bandwidth: bytes/s that a chip sends to its neighbours, or a GPU to those of its host.
      host_bandwidth: bytes/s that a GPU sends to other hosts; None where links lead there.
      usable: share of the memory that programs can use: of TPUs XLA's own limit; of GPUs what is free after the
        CUDA context, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92.
      shapes: of the slices that can be rented, or hosts x GPUs of clusters.
    """

    name: str
    platform: str
    flops: float
    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    host_bandwidth: float | None
    usable: float
    shapes: tuple[str, ...]

    @property
    def topologies(self) -> tuple[str, ...]:
        """Names of the topologies of this chip."""
        return tuple(f"{self.name}:{shape}" for shape in self.shapes)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", 275e12, 32 * GIB, 1200e9, 300e9, None, 0.984, _CUBES),
        Chip("v5e", "tpu", 197e12, 16 * GIB, 819e9, 200e9, None, 0.984, _SQUARES),
        Chip("v5p", "tpu", 459e12, 95 * GIB, 2765e9, 600e9, None, 0.984, (*_CUBES, "16x16x16", "16x16x24")),
        Chip("v6e", "tpu", 918e12, 32 * GIB, 1638e9, 400e9, None, 0.984, _SQUARES),
        Chip("h100", "cuda", 989e12, 80 * 10**9, 3350e9, 450e9, 50e9, 0.92, _HOSTS),
        Chip("h200", "cuda", 989e12, 141 * 10**9, 4800e9, 450e9, 50e9, 0.92, _HOSTS),
    )
}
"""Chip by name."""

GPUS_PER_HOST = 8

_KINDS = {
    # how a device's kind begins, as JAX names it; the first match wins
    **{"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v6": "v6e"},
    **{"NVIDIA H100": "h100", "NVIDIA H200": "h200"},
}


def chip_of_kind(kind: str) -> Chip | None:
    """Returns the chip of a ``jax.Device.device_kind``, such as "TPU v5 lite"; None for others."""
    return next((CHIPS[name] for start, name in _KINDS.items() if kind.startswith(start)), None)
