"""Rules of placement: which axis of which parameter lies over which axis of the mesh."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from raised import mentions

from dalle2_jax import testing
from dalle2_jax.config.experiment import experiment
from dalle2_jax.errors import UserError
from dalle2_jax.models.layers import upsample_nearest
from dalle2_jax.models.priors.ar_prior import ArPriorConfig
from dalle2_jax.models.transformer import TextConfig
from dalle2_jax.models.unet import ResBlock, UNetConfig
from dalle2_jax.planning.hlo import KINDS
from dalle2_jax.stages import ArPriorStage
from dalle2_jax.stages.base import Outputs, StageDefaults, Variables, abstract_variables
from dalle2_jax.training import sharding
from dalle2_jax.training.optim import OptimConfig, Optimizer, make_optimizer, path_name
from dalle2_jax.training.sharding import MeshConfig, array_sharding, make_mesh, partition_spec, tree_shardings
from dalle2_jax.training.step import abstract_state, init_state, make_train_step, state_shardings

pytestmark = pytest.mark.sharding

SGD = Optimizer(*optax.sgd(0.1), optax.constant_schedule(0.1))
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
def test_a_mesh_that_does_not_fit_is_rejected(sizes):
    with pytest.raises(UserError, check=mentions("8 device(s)")):
        make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 8, 1), (-2, 4, 1)])
def test_nonsense_sizes_are_rejected(sizes):
    with pytest.raises(UserError, check=mentions("positive", -1)):
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
    # The channels within a residual block over tensor
    (TENSOR, "mid_0/conv_1/kernel", (3, 3, 64, 64), P(None, None, None, "tensor")),
    (TENSOR, "mid_0/conv_2/kernel", (3, 3, 64, 64), P(None, None, "tensor", None)),
    (TENSOR, "conv_in/kernel", (3, 3, 64, 64), P(None, None, None, None)),
    (BOTH, "mid_0/conv_1/kernel", (3, 3, 64, 64), P(None, None, "fsdp", "tensor")),
    (BOTH, "mid_0/conv_2/kernel", (3, 3, 64, 64), P(None, None, "tensor", "fsdp")),
    # The largest axis that divides over fsdp
    (FSDP, "token_embedding/embedding", (1002, 32), P(None, "fsdp")),
    (FSDP, "token_embedding/embedding", (1000, 32), P("fsdp", None)),
    (FSDP, "blocks/attn/qkv/kernel", (4, 64, 3, 8, 16), P(None, "fsdp", None, None, None)),
    (FSDP, "mid_attn/attn/qkv/kernel", (256, 3, 4, 64), P("fsdp", None, None, None)),
    (FSDP, "unet/conv/kernel", (3, 3, 256, 64), P(None, None, None, "fsdp")),  # a convolution's output channels
    (FSDP, "unet/conv/kernel", (3, 3, 256, 66), P(None, None, "fsdp", None)),  # else its input channels
    (FSDP, "unet/conv/kernel", (3, 3, 254, 66), P(None, None, None, None)),
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


@pytest.mark.parametrize(
    "name, shape, sizes, shard",
    [
        # No axis divides by 8: the largest factors of 8 that divide two of them
        ("blocks/fc/kernel", (4, 36, 1010), (1, 8, 1), (4, 9, 505)),
        ("unet/conv/kernel", (3, 3, 60, 66), (1, 8, 1), (3, 3, 15, 33)),  # of a convolution, two axes of channels
        ("unet/conv/kernel", (3, 3, 33, 68), (1, 8, 1), (3, 3, 33, 17)),  # one, as far as it goes
        ("unet/conv/kernel", (3, 3, 33, 67), (1, 8, 1), (3, 3, 33, 67)),
        ("mid_0/conv_2/kernel", (3, 3, 62, 66), (2, 2, 2), (3, 3, 31, 33)),
        ("mid_0/conv_2/kernel", (3, 3, 62, 61), (1, 4, 2), (3, 3, 31, 61)),  # tensor's axis is taken
    ],
    ids=str,
)
def test_axes_that_do_not_divide(name, shape, sizes, shard):
    assert array_sharding(name, shape, make_mesh(MeshConfig(*sizes))).shard_shape(shape) == shard


PAPER = ("clip", "prior", "ar_prior", "decoder", "upsampler_1", "upsampler_2")


@pytest.mark.parametrize("fsdp", [8, 256])
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_stages_are_sharded_nearly_ideally(name, fsdp):
    """From shapes alone: a device has at most 1.2 times its share of a stage's parameters."""
    mesh = AbstractMesh((1, fsdp, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    params = abstract_variables(paper_stage(name)).params
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(tree_shardings(params, mesh)), strict=True)
    shards = [math.prod(one.shard_shape(leaf.shape)) for leaf, one in pairs]
    assert sum(shards) * fsdp < 1.2 * sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["decoder", "upsampler_1"])
def test_tensor_splits_most_of_a_unet(name):
    mesh = AbstractMesh((1, 1, 8), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    params = abstract_variables(paper_stage(name)).params
    params = params["unet"] if "unet" in params else params
    split = [
        leaf.size
        for leaf, one in zip(jax.tree.leaves(params), jax.tree.leaves(tree_shardings(params, mesh)), strict=True)
        if math.prod(one.shard_shape(leaf.shape)) * 8 == leaf.size
    ]
    assert sum(split) > 0.75 * sum(leaf.size for leaf in jax.tree.leaves(params))


def paper_stage(name):
    clip = experiment("configs/paper.py:clip").build(49_408, None)
    return clip if name == "clip" else experiment(f"configs/paper.py:{name}").build(49_408, clip)


@dataclasses.dataclass(frozen=True)
class Awkward(StageDefaults):
    """Learns a matrix none of whose axes divides by 8."""

    name: str = "awkward"

    def init(self, key):
        return Variables({"kernel": jax.random.normal(key, (12, 6))}, {})

    def loss(self, params, stats, frozen, key, batch):
        return jnp.square(batch["x"] @ params["kernel"]).mean(), Outputs({}, stats)


def test_a_matrix_over_two_axes_is_trained_as_on_one_device(monkeypatch):
    monkeypatch.setattr(sharding, "SIZE_FLOOR", 1)
    stage, optimizer, batch = Awkward(), make_optimizer(OptimConfig(lr=0.1), 4), {"x": np.eye(16, 12, dtype=np.float32)}
    results = []
    for sizes in ((8, 1, 1), (1, 8, 1)):
        mesh = make_mesh(MeshConfig(*sizes))
        step = make_train_step(stage, optimizer, 0.9, state_shardings(stage, optimizer, mesh), 2)
        state = init_state(stage, optimizer, jax.random.key(0), mesh)
        for _ in range(2):
            state, _ = step(state, {}, jax.random.key(1), sharding.shard_batch(batch, mesh))
        assert step._cache_size() == 1
        results.append(state)
    assert results[1].params["kernel"].addressable_shards[0].data.shape == (3, 3)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6), *results)


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


# --- feature maps -----------------------------------------------------------------------------

ROWS = 8 * 67
"""A batch, whose rows on a device no other axis has."""


UNET = UNetConfig(8, channels=16, channel_mult=(1,), norm_groups=8, head_channels=16)


@dataclasses.dataclass(frozen=True)
class Upsampling(StageDefaults):
    """One residual block that upsamples 8x8 maps."""

    name: str = "block"
    block: ResBlock = ResBlock(UNET, 16, False, "up")

    def init(self, key):
        return Variables(self.block.init(key, jnp.zeros((1, 8, 8, 16)), jnp.zeros((1, 64)))["params"], {})

    def loss(self, params, stats, frozen, key, batch):
        out = self.block.apply({"params": params}, batch["x"], batch["emb"])
        return jnp.square(out).mean(), Outputs({}, stats)


def lowered(stage, shapes, optimizer):
    """Returns the train step of a stage over fsdp 8, from shapes alone."""
    mesh = make_mesh(MeshConfig(1, 8, 1))
    shardings = state_shardings(stage, optimizer, mesh)
    state = sharding.with_shardings(abstract_state(stage, optimizer), shardings)
    frozen = testing.tiny_frozen(stage)
    frozen = sharding.with_shardings(frozen, sharding.tree_shardings(frozen, mesh))
    rows = sharding.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((ROWS, *leaf.shape[1:]), leaf.dtype, sharding=rows) for name, leaf in shapes.items()
    }
    step = make_train_step(stage, optimizer, 0.9, shardings)
    return step.lower(state, frozen, jax.eval_shape(lambda: jax.random.key(0)), batch)


@pytest.fixture
def small_arrays_are_split(monkeypatch):
    monkeypatch.setattr(sharding, "SIZE_FLOOR", 1024)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("small_arrays_are_split")
def test_an_upsampled_map_is_never_gathered():
    """Its kernels are: XLA would gather the global batch on every device, four times as large as what it came from."""
    shapes = {"x": jax.ShapeDtypeStruct((1, 8, 8, 16), jnp.float32), "emb": jax.ShapeDtypeStruct((1, 64), jnp.float32)}
    program = lowered(Upsampling(), shapes, SGD).compile().as_text()
    gathered = [tuple(map(int, shape.split(","))) for shape in re.findall(r"\[([\d,]+)\]\S* all-gather\(", program)]
    assert (3, 3, 16, 16) in gathered
    assert not [shape for shape in gathered if ROWS in shape]


CONSTRAINT = re.compile(r"sharding_constraint \S+ <@mesh, \[(\{.*?\}).*\]> : tensor<(\d+)x")
COLLECTIVE = re.compile(rf" = (.*) (?:{'|'.join(KINDS)})\S*\(")


def exchanged(program):
    """Returns the shapes of what devices exchange in a compiled program."""
    results = [match[1] for line in program.splitlines() if (match := COLLECTIVE.search(line))]
    return [tuple(map(int, shape.split(","))) for result in results for shape in re.findall(r"\[([\d,]+)\]", result)]


@pytest.mark.parametrize(("kind", "in_block"), [("decoder", True), ("upsampler", False)])
def test_an_upsampling_network_exchanges_no_activations(kind, in_block, small_arrays_are_split):
    """It upsamples in a residual block, in both branches; or before a convolution alone."""
    stage = testing.tiny_stage(kind)
    levels = {"channel_mult": (1, 1), "resblock_updown": in_block}
    if kind == "decoder":
        model = dataclasses.replace(stage.model, unet=dataclasses.replace(stage.model.unet, **levels))
    else:
        model = dataclasses.replace(stage.model, **levels)
    program = lowered(dataclasses.replace(stage, model=model), testing.tiny_batch(1), SGD)
    assert set(CONSTRAINT.findall(program.as_text())) == {('{"data", "fsdp"}', str(ROWS))}
    shapes = exchanged(program.compile().as_text())
    assert not [shape for shape in shapes if any(size % (ROWS // 8) == 0 for size in shape)]


def test_an_upsampled_map_and_its_gradient_are_constrained():
    def both(x):
        y, pull_back = jax.vjp(upsample_nearest, x)
        return pull_back(y)

    with sharding.logical_axes(make_mesh(MeshConfig(1, 8, 1))):
        program = jax.jit(both).lower(jnp.ones((ROWS, 2, 2, 3))).as_text()
    assert CONSTRAINT.findall(program) == [('{"data", "fsdp"}', str(ROWS))] * 2


@pytest.mark.usefixtures("small_arrays_are_split")
@pytest.mark.parametrize("kind", (*testing.KINDS, "ar_prior"))
def test_devices_exchange_parameters_and_no_activations(kind):
    """Of every stage under fsdp. Only CLIP's loss is over the embeddings of the whole batch. The new state takes the
    buffers of the old one: what a step returns in other memory are metrics.
    """
    stage = testing.tiny_stage("clip_vit" if kind == "ar_prior" else kind)
    if kind == "ar_prior":
        text = TextConfig(testing.VOCAB_SIZE, testing.CONTEXT_LENGTH, width=32, layers=1, heads=2)
        model = ArPriorConfig(text, 32, 1, 2, context_length=8, embed_dim=testing.EMBED_DIM, components=6, buckets=8)
        stage = ArPriorStage(model, stage)
    program = lowered(stage, testing.tiny_batch(1), SGD).compile()
    memory, pointers = program.memory_analysis(), 8 * len(jax.tree.leaves(program.out_info))
    assert 0 <= memory.output_size_in_bytes - memory.alias_size_in_bytes - pointers < 128
    shapes = exchanged(program.as_text())
    assert any(len(shape) > 1 for shape in shapes)
    of_rows = [math.prod(shape) for shape in shapes if any(size % (ROWS // 8) == 0 for size in shape)]
    assert max(of_rows, default=0) <= (ROWS * testing.EMBED_DIM if kind.startswith("clip") else 0)


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.arange(8.0).reshape(1, 2, 2, 2)
    assert "sharding" not in jax.jit(upsample_nearest).lower(x).as_text()
    with jax.set_mesh(make_mesh(MeshConfig())):  # a mesh of somebody else's, whose axes mean nothing here
        assert "constraint" not in jax.jit(upsample_nearest).lower(x).as_text()


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
