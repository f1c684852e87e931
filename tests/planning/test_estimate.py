"""The roofline of a step, for traffic with known times."""

import pytest

from dalle2_jax.planning.chips import CHIPS
from dalle2_jax.planning.estimate import estimate, group_bandwidth
from dalle2_jax.planning.hlo import Collective, Traffic

V5P, H200 = CHIPS["v5p"], CHIPS["h200"]


def test_a_step_takes_its_largest_part_or_their_sum():
    everyone = tuple(range(8))
    reduced = Collective("all-reduce", int(600e9), everyone, 1)
    traffic = Traffic(matrix_bytes=2765e9, other_bytes=2 * 2765e9, collectives=(reduced,))
    found = estimate(V5P, 8, traffic, model_flops=8 * 459e12, hardware_flops=16 * 459e12)
    assert found.compute == pytest.approx(2.0)
    assert found.memory == pytest.approx(3.0)
    assert found.network == pytest.approx(2 * 7 / 8)
    assert found.overlapped == pytest.approx(3.0)
    assert found.serial == pytest.approx(2.0 + 2.0 + 2 * 7 / 8)
    assert found.utilisation == pytest.approx(1 / 3)
    assert found.serial_utilisation == pytest.approx(1 / found.serial)


def test_a_group_of_a_torus_uses_the_links_of_its_axes():
    assert group_bandwidth(V5P, 512, tuple(range(512))) == 600e9
    assert group_bandwidth(V5P, 512, tuple(range(8))) == pytest.approx(200e9)
    assert group_bandwidth(V5P, 512, (0,)) == 600e9


def test_a_group_of_gpus_leaves_a_host_by_its_own_adapters():
    assert group_bandwidth(H200, 64, tuple(range(8))) == 450e9
    assert group_bandwidth(H200, 64, tuple(range(16))) == 400e9
    assert group_bandwidth(H200, 64, (0, 8, 16)) == 50e9
