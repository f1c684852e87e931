"""Plans of tiny stages on CPU devices: their parts, their errors, and the command."""

import json

import jax
import jax.numpy as jnp
import pytest
from raised import mentions

from dalle2_jax import cli, rng
from dalle2_jax.cli import plan as command
from dalle2_jax.config.experiment import experiment
from dalle2_jax.errors import ConfigError
from dalle2_jax.planning import planner, program, topology
from dalle2_jax.planning.chips import CHIPS
from dalle2_jax.planning.flops import count_flops
from dalle2_jax.planning.planner import plan, without_remat
from dalle2_jax.planning.result import shown_bytes
from dalle2_jax.training.optim import make_optimizer
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.training.step import init_state

PAGE = "tests/support/tiny_system.py"


@pytest.fixture(scope="module")
def planned():
    """The tiny upsampler on eight devices, with kernels of any size sharded."""
    return plan(f"{PAGE}:upsampler_1", "cpu:8", mesh={"data": 2, "fsdp": -1}, batch_size=16, memory=2**30)


def test_a_plan_has_the_mesh_and_the_batch(planned):
    assert (planned.stage, planned.program, planned.devices) == ("upsampler_1", "train", 8)
    assert planned.mesh == {"data": 2, "fsdp": 4, "tensor": 1}
    assert (planned.batch_size, planned.steps, planned.fits) == (16, 24, True)
    assert planned.time is None and planned.device_days is None  # a CPU has no datasheet here


@pytest.mark.sharding
def test_the_state_is_that_of_a_run(planned):
    """Bytes on the first of eight devices, of the arrays that training creates."""
    stage, _ = program.build_stage(tiny := experiment(f"{PAGE}:upsampler_1"), None)
    optimizer = make_optimizer(tiny.optim, 24, stage.training_rules.decay)
    state = init_state(stage, optimizer, rng.root(0), make_mesh(MeshConfig(2, 4, 1)))

    def held(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    memory = planned.memory
    assert (memory.parameters, memory.optimizer) == (held(state.params), held(state.opt_state))
    assert memory.averages == held((state.ema, state.ema_stats))
    assert planned.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    total = memory.parameters + memory.optimizer + memory.averages + memory.batch + memory.temporaries
    assert total <= memory.peak < 1.1 * total + 10_000


def test_gradients_are_summed_over_the_devices(planned):
    runs, sent = planned.collectives["all-reduce"]
    assert runs >= 1 and sent >= 2 * 7 / 8 * planned.memory.parameters / 2


def test_the_table_and_the_json_agree(planned, tmp_path):
    planned.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["memory"]["peak"] == planned.memory.peak and content["fits"] is True
    assert content["traffic"]["collectives"]["all-reduce"]["runs"] == planned.collectives["all-reduce"][0]
    table = planned.table()
    assert f"{shown_bytes(planned.memory.peak)} of 1 GiB: fits" in table and f"{planned.parameters:,}" in table


def test_sizes_have_units():
    assert [shown_bytes(size) for size in (None, 5, 1536, 3 * 2**30, 2**41)] == [
        "-",
        "5 B",
        "1.5 KiB",
        "3 GiB",
        "2 TiB",
    ]


def test_flops_of_loops_branches_and_convolutions():
    w = jnp.ones((5, 8, 8))

    def loop(x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    one = 2 * 4 * 8 * 8
    assert count_flops(jax.make_jaxpr(loop)(jnp.ones((4, 8)))) == 5 * one
    # forward, and two products a layer backward
    assert (
        count_flops(jax.make_jaxpr(jax.grad(lambda x, w: loop_with(x, w).sum(), (0, 1)))(jnp.ones((4, 8)), w))
        == 15 * one
    )
    branch = jax.make_jaxpr(lambda p, x: jax.lax.cond(p, loop, lambda x: x @ w[0], x))(True, jnp.ones((4, 8)))
    assert count_flops(branch) == 5 * one
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 16))
    dims = ("NHWC", "HWIO", "NHWC")
    convolution = jax.make_jaxpr(
        lambda x: jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)
    )
    assert count_flops(convolution(image)) == 2 * (2 * 8 * 8 * 16) * (3 * 3 * 3)


def loop_with(x, w):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]


def test_recomputation_is_not_model_flops():
    plain = experiment(f"{PAGE}:upsampler_1")
    recomputed = experiment(f"{PAGE}:upsampler_1", **{"model.remat": True})
    assert without_remat(recomputed) == plain
    mesh = topology.find_topology("cpu:1").mesh((1, 1, 1))
    flops = [count_flops(program.train_program(each, None, mesh).traced.jaxpr) for each in (plain, recomputed)]
    assert 1.05 * flops[0] < flops[1] < 1.5 * flops[0]


@pytest.mark.parametrize("stage", ["prior", "ar_prior", "decoder", "upsampler_1"])
def test_sampling_programs_are_those_of_every_stage(stage):
    tiny = experiment(f"{PAGE}:{stage}")
    clip = planner.page_clip(f"{PAGE}:clip") if "clip" in tiny.requires else None
    mesh = topology.find_topology("cpu:2").mesh((2, 1, 1))
    found = program.sample_program(tiny, clip, mesh)
    outputs = jax.tree.leaves(found.traced.out_info)
    assert [leaf.shape[0] for leaf in outputs] == [tiny.run.batch_size]
    assert (found.parts["frozen"] is not None) == (stage in ("prior", "ar_prior"))


def test_stored_embeddings_need_no_clip():
    tiny = experiment(f"{PAGE}:prior", data={"kind": "embeddings"})
    stage, clip = program.build_stage(tiny, planner.page_clip(f"{PAGE}:prior"))
    assert program.batch_columns(tiny, stage) == stage.inputs
    images = experiment(f"{PAGE}:prior")
    assert "image" in program.batch_columns(images, stage)
    shapes = program.column_shapes(tiny, stage, clip, 4)
    assert shapes["image_emb"].shape == (4, 8) and shapes["tokens"].shape == (4, 32)


def test_without_its_clip_a_stage_cannot_be_built():
    with pytest.raises(ConfigError, check=mentions("decoder", field="clip")):
        plan(experiment(f"{PAGE}:decoder"), "cpu:1")


def test_clip_is_not_sampled():
    with pytest.raises(ConfigError, check=mentions("clip", field="stage")):
        plan(f"{PAGE}:clip", "cpu:1", sample=True)


@pytest.mark.parametrize(
    ("options", "facts", "field"),
    [
        ({"batch_size": 12}, ("--batch_size 16",), "batch_size"),
        ({"mesh": {"fsdp": 3}}, ("--mesh data=2,fsdp=4,tensor=1",), "mesh"),
        ({"mesh": {"model": 2}}, ("'model'", "tensor"), "mesh"),
        ({"mesh": {"fsdp": 0}}, ("positive",), "mesh"),
        ({"mesh": {"fsdp": -1, "data": -1}}, (-1,), "mesh"),
    ],
)
def test_what_does_not_divide(options, facts, field):
    with pytest.raises(ConfigError, check=mentions(*facts, field=field)):
        plan(f"{PAGE}:upsampler_1", "cpu:8", **options)


@pytest.mark.parametrize(
    ("reason", "size"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 41.5G of 15.75G hbm.", 41.5 * 2**30),
        ("Ran out of memory on HBM: HLO temporaries (512.00M) exceeds available HBM (15.75G)", 2**29),
        ("RESOURCE_EXHAUSTED", None),
    ],
)
def test_needed_memory_is_read_from_the_message(reason, size):
    assert planner.needed_bytes(reason) == size


def test_a_program_that_runs_out_of_memory_does_not_fit(monkeypatch):
    def compile_nothing(traced, options):
        return None, 2**40

    monkeypatch.setattr(planner, "_compile", compile_nothing)
    found = plan(f"{PAGE}:upsampler_1", "cpu:2", memory=2**30)
    assert found.fits is False and found.memory.peak == 2**40 and found.memory.temporaries is None
    assert found.traffic is None and "does not fit" in found.table() and found.to_json()["traffic"] is None


# --- the command ----------------------------------------------------------------------------


def test_exit_codes(planned, monkeypatch, capsys, tmp_path):
    """0 fits, 1 does not, 2 cannot tell; the table is printed and the JSON written in each case."""
    found = {"memory": []}

    def fake(config, name, *, memory, **options):
        found["memory"].append(memory)
        fits = None if memory is None else planned.memory.peak <= memory
        return type(planned)(**{**vars(planned), "fits": fits})

    monkeypatch.setattr(planner, "plan", fake)
    words = ["plan", "--config", f"{PAGE}:upsampler_1", "--topology", "cpu:8", "--out", str(tmp_path / "out.json")]
    for more, code in (
        ((), 2),
        (("--memory_gib", "1"), 0),
        (("--memory_gib", "0.001"), int(planned.memory.peak > 2**20)),
    ):
        (tmp_path / "out.json").unlink(missing_ok=True)
        assert cli.main([*words, *more]) == code
        out, err = capsys.readouterr()
        assert "memory of a device" in out and (err == "") == (code == 0)
        assert (tmp_path / "out.json").exists()
    assert found["memory"] == [None, 2**30, int(0.001 * 2**30)]


def test_the_command_finds_the_smallest_slice_alone(tmp_path, capsys):
    words = ["plan", "--config", f"{PAGE}:clip", "--topology", "cpu:2", "--memory_gib", "1", "--search", "smallest"]
    assert cli.main([*words, "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["smallest"] == found["trials"][0] and len(found["trials"]) == 1 and found["fastest"] is None
    assert "smallest slice: --topology cpu:2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (("--topology", "v5e:3x3"), "v5e:4x4"),
        (("--topology", "cpu:8", "--mesh", "model=8"), "tensor"),
        (("--topology", "cpu:8", "--mesh", "fsdp"), "fsdp"),
        (("--topology", "cpu:8", "--set", "optim"), "FIELD=VALUE"),
        (("--topology", "cpu:8", "--set", "optim.rl=1"), "'lr'"),
        (("--topology", "cpu:8", "--memory_gib", "0"), "0.001"),
        (("--topology", "v5e", "--search", "--sample"), "--sample"),
        (("--topology", "v5e", "--search", "smalest"), "'smallest'"),
    ],
)
def test_wrong_arguments(words, fact, capsys):
    assert cli.main(["plan", "--config", f"{PAGE}:upsampler_1", *words]) == 2
    err = capsys.readouterr().err
    assert fact in err and err.count("\n") == 1


def test_values_are_literals_or_text():
    assert command.setting("optim.lr=1e-4") == ("optim.lr", 1e-4)
    assert command.setting("data={'kind': 'embeddings'}") == ("data", {"kind": "embeddings"})
    assert command.setting("text.path=a=b") == ("text.path", "a=b")
    assert command.mesh_sizes("data=2,fsdp=-1") == {"data": 2, "fsdp": -1}


def test_the_light_parser_knows_the_axes():
    assert command.AXES == topology.AXES
    assert {name.partition(":")[0] for name in topology.topology_names()} == set(CHIPS)
