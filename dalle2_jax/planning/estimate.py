"""Time of a step from the figures of a datasheet: the roofline of compute, memory and network.

    compute = FLOPs / peak,    memory = bytes moved / memory bandwidth,    network = bytes sent / link bandwidth     (1)

A step takes at least as long as the largest of the three, if everything overlaps, and if nothing overlaps but products
with their own operands

    max(compute, memory of products) + memory of everything else + network                                         (2)

(Williams et al. 2009, Roofline). Real kernels are slower than their roofline, so even (2) is no upper bound.
"""

import dataclasses
import math
from collections.abc import Iterable

from dalle2_jax.planning.chips import GPUS_PER_HOST, Chip
from dalle2_jax.planning.hlo import Collective, Traffic

DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step on one device, eq. (1) and (2).

    Attributes:
      compute: of all FLOPs at the peak, recomputation included.
      memory: of all memory traffic.
      network: of all collectives, one after the other.
      overlapped: of the step if everything overlaps.
      serial: of the step if nothing does.
      utilisation: model FLOPs over the peak's in the same time, of ``overlapped``.
      serial_utilisation: of ``serial``.
    """

    compute: float
    memory: float
    network: float
    overlapped: float
    serial: float
    utilisation: float
    serial_utilisation: float


def estimate(chip: Chip, devices: int, traffic: Traffic, model_flops: float, hardware_flops: float) -> Estimate:
    """Returns the time of a step.

    Args:
      chip: the accelerator.
      devices: how many there are.
      traffic: of one device.
      model_flops: of a step on all devices, without recomputation.
      hardware_flops: with it.
    """
    compute = hardware_flops / devices / chip.flops
    matrix, other = (each / chip.memory_bandwidth for each in (traffic.matrix_bytes, traffic.other_bytes))
    network = network_seconds(chip, devices, traffic.collectives)
    overlapped = max(compute, matrix + other, network)
    serial = max(compute, matrix) + other + network
    ideal = model_flops / devices / chip.flops
    shares = (ideal / seconds if seconds else 0.0 for seconds in (overlapped, serial))
    return Estimate(compute, matrix + other, network, overlapped, serial, *shares)


def network_seconds(chip: Chip, devices: int, collectives: Iterable[Collective]) -> float:
    """Returns the time of collectives on rings, one after the other, without latency."""
    return sum(each.sent / group_bandwidth(chip, devices, each.group) for each in collectives)


def group_bandwidth(chip: Chip, devices: int, group: tuple[int, ...]) -> float:
    """Returns the bytes/s that each device of a group can send on rings through the group.

    On a torus, a group of n of N chips spans log n / log N of its axes, and uses their links. GPUs of one host send
    over NVLink; a ring through several hosts leaves each of them by as many adapters as the group has GPUs there.
    """
    if chip.host_bandwidth is None:
        return chip.link_bandwidth * (math.log(len(group)) / math.log(devices) if devices > len(group) > 1 else 1.0)
    hosts = len({place // GPUS_PER_HOST for place in group})
    if hosts == 1:
        return chip.link_bandwidth
    return min(chip.link_bandwidth, chip.host_bandwidth * len(group) / hosts)
