"""Rules of placement: which axis of which parameter lies over which axis of the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dalle2_jax import testing
from dalle2_jax.training import sharding
from dalle2_jax.training.optim import OptimConfig, make_optimizer, path_name
from dalle2_jax.training.sharding import MeshConfig, make_mesh, partition_spec
from dalle2_jax.training.step import abstract_state, state_shardings
from dalle2_jax.types import UserError

FSDP, TENSOR, BOTH = MeshConfig(2, 4, 1), MeshConfig(4, 1, 2), MeshConfig(2, 2, 2)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(2, -1, 2), (2, 2, 2)),
        (MeshConfig(1, 1, -1), (1, 1, 8)),
        (MeshConfig(2, 4, 1), (2, 4, 1)),
    ],
)
def test_a_mesh_takes_the_devices_that_are_left(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (16, 1, 1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(UserError, match=r"does not fit the 8 device\(s\)"):
        make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 8, 1), (-2, 4, 1)])
def test_nonsense_sizes_are_refused(sizes):
    with pytest.raises(UserError, match="must be positive, with at most one -1"):
        make_mesh(MeshConfig(*sizes))


RULES = [
    # Heads and hidden units over tensor, of a scanned layer [layers, ...] as of a single one
    (TENSOR, "blocks/attn/qkv/kernel", (4, 64, 3, 8, 16), P(None, None, None, "tensor", None)),
    (TENSOR, "mid_attn/attn/qkv/kernel", (256, 3, 4, 64), P(None, None, "tensor", None)),
    (TENSOR, "blocks/attn/q/kernel", (4, 64, 8, 16), P(None, None, "tensor", None)),
    (TENSOR, "mid_attn/attn/context_kv/kernel", (256, 2, 4, 64), P(None, None, "tensor", None)),
    (TENSOR, "mid_attn/attn/out/kernel", (4, 64, 256), P("tensor", None, None)),
    (TENSOR, "blocks/attn/out/kernel", (4, 8, 16, 128), P(None, "tensor", None, None)),
    (TENSOR, "blocks/fc/kernel", (4, 64, 256), P(None, None, "tensor")),
    (TENSOR, "blocks/proj/kernel", (4, 256, 64), P(None, "tensor", None)),
    (TENSOR, "blocks/attn/qkv/kernel", (4, 64, 3, 5, 32), P(None, None, None, None, None)),  # 5 heads
    (TENSOR, "visual/proj/kernel", (512, 256), P(None, None)),
    (TENSOR, "mid_0/conv_1/kernel", (3, 3, 64, 64), P(None, None, None, None)),
    # The largest axis that divides over fsdp
    (FSDP, "token_embedding/embedding", (1002, 32), P(None, "fsdp")),
    (FSDP, "token_embedding/embedding", (1000, 32), P("fsdp", None)),
    (FSDP, "blocks/attn/qkv/kernel", (4, 64, 3, 8, 16), P(None, "fsdp", None, None, None)),
    (FSDP, "mid_attn/attn/qkv/kernel", (256, 3, 4, 64), P("fsdp", None, None, None)),
    (FSDP, "unet/conv/kernel", (3, 3, 256, 64), P(None, None, None, "fsdp")),  # a convolution's output channels
    (FSDP, "unet/conv/kernel", (3, 3, 256, 66), P(None, None, None, None)),
    (FSDP, "opt_state/1/0/mu/unet/conv/kernel", (3, 3, 256, 64), P(None, None, None, "fsdp")),
    # Both, on different axes
    (BOTH, "blocks/fc/kernel", (4, 64, 256), P(None, "fsdp", "tensor")),
    (BOTH, "blocks/attn/qkv/kernel", (4, 64, 3, 8, 16), P(None, "fsdp", None, "tensor", None)),
    # Small arrays are whole
    (BOTH, "blocks/fc/kernel", (4, 64, 63), P()),
    (BOTH, "logit_scale", (), P()),
    (MeshConfig(), "blocks/fc/kernel", (4, 64, 256), P(None, None, None)),
]


@pytest.mark.parametrize(("config", "name", "shape", "spec"), RULES)
def test_rules(config, name, shape, spec):
    assert partition_spec(name, shape, make_mesh(config)) == spec


@pytest.mark.parametrize("kind", testing.KINDS)
def test_the_average_and_the_moments_lie_with_their_parameter(kind, monkeypatch):
    monkeypatch.setattr(sharding, "SIZE_FLOOR", 512)
    stage, optimizer = testing.tiny_stage(kind), make_optimizer(OptimConfig(), 10)
    state = state_shardings(stage, optimizer, make_mesh(BOTH))
    assert jax.tree.structure(state) == jax.tree.structure(abstract_state(stage, optimizer))
    params = jax.tree_util.tree_leaves_with_path(state.params)
    assert any("fsdp" in leaf.spec for _, leaf in params)
    moments = {path_name(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    for (path, leaf), ema in zip(params, jax.tree.leaves(state.ema), strict=True):
        assert ema.spec == leaf.spec
        specs = [spec for name, spec in moments.items() if name.endswith(f"/{path_name(path)}")]
        assert len(specs) >= 2 and all(spec == leaf.spec for spec in specs)
    assert state.step.spec == P()


def test_rows_of_a_batch_are_spread_over_data_and_fsdp():
    rows = np.arange(16, dtype=np.int32).reshape(8, 2)
    batch = sharding.shard_batch({"tokens": rows, "mask": rows > 3}, make_mesh(BOTH))
    np.testing.assert_array_equal(batch["tokens"], rows)
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {(2, 2)}
    assert batch["mask"].dtype == bool and batch["mask"].sharding.spec == P(("data", "fsdp"))


def test_shapes_get_their_shardings():
    mesh = make_mesh(BOTH)
    abstract = {"fc": {"kernel": jax.ShapeDtypeStruct((256, 256), jnp.float32)}}
    placed = sharding.with_shardings(abstract, sharding.tree_shardings(abstract, mesh))
    assert placed["fc"]["kernel"].sharding == jax.NamedSharding(mesh, P("fsdp", "tensor"))
