"""Names of topologies, and meshes on them."""

import math

import pytest
from raised import mentions

from dalle2_jax.errors import ConfigError, UsageError
from dalle2_jax.planning import topology
from dalle2_jax.planning.chips import CHIPS
from dalle2_jax.planning.topology import (
    MissingCompiler,
    all_meshes,
    check_name,
    find_topology,
    mesh_sizes,
    nearest_mesh,
)
from dalle2_jax.training.sharding import MeshConfig


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("v5p:3x3x3", ("v5p:3x3x3", "v5p:8x8x8", "v5p:16x16x24")),
        ("v5e", ("v5e:4x4",)),
        ("h200:3x8", ("h200:2x8",)),
        ("v9:4x4", ("v5p", "h200", "cpu:8")),
        ("", ("v5p", "cpu:8")),
        ("cpu:0", ("cpu:N", 512)),
        ("cpu:many", ("cpu:N", 512)),
        ("cpu:99999999999999999999", ("cpu:N", 512)),
    ],
)
def test_a_topology_that_does_not_exist(name, facts):
    with pytest.raises(UsageError, check=mentions(*facts)):
        find_topology(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:4x4", "tpu"), ("h200:2x8", "cuda")])
def test_a_compiler_that_is_not_installed(name, extra, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda module: None)
    find_topology.cache_clear()
    with pytest.raises(MissingCompiler, check=mentions(name, f"pip install 'dalle2_jax[{extra}]'", extra=extra)):
        find_topology(name)


def test_cpu_devices_are_those_of_no_backend():
    """The process has eight devices at most, and its own are not used."""
    found = find_topology("cpu:12")
    assert found.chip is None and len(found.devices) == 12
    mesh = found.mesh((2, 3, 2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 3, "tensor": 2}
    assert mesh.devices.flat[5] is found.devices[5]


def test_every_chip_has_its_topologies():
    for chip in CHIPS.values():
        assert [check_name(name) for name in chip.topologies] == [(chip, shape) for shape in chip.shapes]
        sizes = [math.prod(map(int, shape.split("x"))) for shape in chip.shapes]
        assert sizes == sorted(sizes), chip.name


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [
        (MeshConfig(), 8, (8, 1, 1)),
        (MeshConfig(1, -1, 1), 8, (1, 8, 1)),
        (MeshConfig(2, 2, 2), 8, (2, 2, 2)),
        (MeshConfig(2, -1, 2), 8, (2, 2, 2)),
    ],
)
def test_meshes(config, devices, sizes):
    assert mesh_sizes(config, devices) == sizes


@pytest.mark.parametrize(
    ("config", "devices", "near"),
    [
        (MeshConfig(1, 12, 1), 16, "data=1,fsdp=16,tensor=1"),
        (MeshConfig(3, 5, 1), 16, "data=4,fsdp=4,tensor=1"),
        (MeshConfig(-1, 3, 1), 8, "data=2,fsdp=4,tensor=1"),
        (MeshConfig(-1, -1, 4), 8, "data=2,fsdp=1,tensor=4"),
    ],
)
def test_a_mesh_that_does_not_fit_offers_the_nearest(config, devices, near):
    with pytest.raises(ConfigError, check=mentions(f"--mesh {near}", field="mesh")):
        mesh_sizes(config, devices)


def test_all_meshes_have_all_devices():
    found = all_meshes(12)
    assert len(found) == len(set(found)) == 18
    assert {math.prod(mesh) for mesh in found} == {12}
    assert nearest_mesh([12, 1, 1], 12) == (12, 1, 1)
