"""What a search tries and finds, with a compiler whose memory and time are formulas."""

import dataclasses
import math

import pytest
from raised import mentions

from dalle2_jax.config.experiment import experiment
from dalle2_jax.errors import ConfigError, UsageError
from dalle2_jax.planning import search as module
from dalle2_jax.planning.estimate import Estimate
from dalle2_jax.planning.result import Memory, Plan
from dalle2_jax.planning.search import Compiler, Settings, find, first_that_fits, meshes, remat_values, search_plans

PAGE = "tests/support/tiny_system.py:decoder"
MOST, LEAST = (True, "blocks"), (False, "none")
"""Values of ``remat``, a switch or a policy."""

V5E = ("v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8")


@pytest.fixture(scope="module")
def decoder():
    return dataclasses.replace(found := experiment(PAGE), run=dataclasses.replace(found.run, batch_size=64))


class Formulas:
    """State over fsdp and tensor, activations over data and fsdp; recomputation halves them and costs a third."""

    def __init__(self, state, activations, available=16):
        self.state, self.activations, self.limit, self.compiled = state, activations, available, []

    def compile(self, planned, topology, sizes):
        data, fsdp, tensor = sizes
        remat = planned.spec.model.unet.remat
        stored = {False: 1.0, "none": 1.0, "dots": 0.75, True: 0.5, "blocks": 0.5}[remat]
        peak = self.state_bytes(planned, topology, sizes) + self.activations / (data * fsdp) * stored
        seconds = (5 - 2 * stored) / 3 * (1 + fsdp / 100 + tensor)
        self.compiled.append((topology, sizes, remat))
        memory = Memory(0, 0, 0, 0, 0, 0, math.ceil(peak), self.limit)
        time = Estimate(seconds, 0.0, 0.0, seconds, seconds, 0.5, 0.5)
        mesh = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
        devices, fits = data * fsdp * tensor, peak <= self.limit
        return Plan("decoder", "train", topology, devices, mesh, 64, 10, 1, memory, fits, 1.0, 1.0, None, time, 0.0)

    def state_bytes(self, planned, topology, sizes):
        return self.state / (sizes[1] * sizes[2])

    def run(self, planned, topologies=V5E, fastest=True):
        return find(planned, topologies, Compiler(self.compile, self.state_bytes, lambda name: self.limit), fastest)


def test_the_smallest_slice_and_its_fastest_plan(decoder):
    """State 100 and activations 160 of 16 a device: 16 devices are the first on which half the activations fit."""
    formulas = Formulas(100, 160)
    found = formulas.run(decoder)
    assert found.smallest.plan.topology == "v5e:4x4" and found.smallest.settings.remat in MOST
    assert found.fastest.plan.mesh == {"data": 1, "fsdp": 16, "tensor": 1}
    assert found.fastest.settings.remat == "dots"  # 100 / 16 + 0.75 * 160 / 16 is less than 16
    assert {name for name, *_ in formulas.compiled} == {"v5e:2x4", "v5e:4x4"}


def test_the_smallest_slice_alone(decoder):
    """State 100 needs 8 devices of 16. Nothing else is compiled where they hold the activations, too."""
    formulas = Formulas(100, 16)
    found = formulas.run(decoder, fastest=False)
    assert found.smallest.plan.topology == "v5e:2x4" and found.fastest is None
    assert len(formulas.compiled) == len(found.trials) == 1
    assert "smallest slice: --topology v5e:2x4" in found.table() and "fastest" not in found.table()


def test_activations_may_need_a_much_larger_slice(decoder):
    """Activations 1,600: half of them over 64 devices are the first below 16."""
    formulas = Formulas(1, 1600)
    assert formulas.run(decoder, fastest=False).smallest.plan.topology == "v5e:8x8"
    assert len(formulas.compiled) == 4


def test_less_sharding_is_faster_where_it_fits(decoder):
    found = Formulas(60, 16).run(decoder, ("v5e:4x4",))
    assert found.fastest.plan.mesh == {"data": 4, "fsdp": 4, "tensor": 1}
    assert found.fastest.settings.remat in LEAST
    assert "--mesh data=4,fsdp=4,tensor=1 --set model.unet.remat=" in found.table()


def test_tensor_parallelism_is_tried_last(decoder):
    odd = dataclasses.replace(decoder, run=dataclasses.replace(decoder.run, batch_size=4))
    found = Formulas(100, 0).run(odd, ("v5e:2x4",))
    assert found.fastest.plan.mesh["tensor"] == 2


def test_slices_over_which_the_batch_does_not_divide_are_left_away(decoder):
    odd = dataclasses.replace(decoder, run=dataclasses.replace(decoder.run, batch_size=1))
    found = Formulas(10, 0).run(odd, ("v5e:2x2", "v5e:2x4", "v5e:4x4"))
    assert found.smallest.plan.topology == "v5e:2x2" and found.smallest.plan.mesh["tensor"] == 4
    assert Formulas(10, 0).run(odd, ("v5e:4x4",)).smallest is None  # sixteen ways are more than MAX_TENSOR


def test_meshes_that_a_slice_does_not_have_are_left_away(decoder):
    formulas = Formulas(100, 0)
    known = formulas.state_bytes
    formulas.state_bytes = lambda planned, name, sizes: math.inf if "2x4" in name else known(planned, name, sizes)
    assert formulas.run(decoder).smallest.plan.topology == "v5e:4x4"


def test_nothing_fits(decoder):
    found = Formulas(1e9, 1).run(decoder)
    assert found.smallest is None and found.fastest is None and found.trials == ()
    assert found.to_json() == {"smallest": None, "fastest": None, "trials": []}


@pytest.mark.parametrize("threshold", range(9))
def test_bisection_finds_the_first_that_fits(threshold):
    asked = []

    def test(option):
        asked.append(option)
        return (option,) if option >= threshold else None

    assert first_that_fits(test, range(8)) == (None if threshold == 8 else (threshold,))
    assert len(asked) <= 4


def test_settings_change_the_fields_of_their_names(decoder):
    assert remat_values(decoder) in ([False, True], ["none", "dots", "blocks"])
    assert Settings(remat="dots").apply(decoder).spec.model.unet.remat == "dots"
    assert Settings().apply(decoder) == decoder
    with pytest.raises(ConfigError, check=mentions("remat")):
        Settings(remat="everything").apply(decoder)


def test_micro_batches_divide_the_rows_of_a_device(decoder, monkeypatch):
    names = [field.name for field in dataclasses.fields(module.OptimConfig)]
    if "accumulate" not in names:
        assert module.micro_batches(decoder, (2, 4, 1)) == [None]
    monkeypatch.setattr(module, "ACCUMULATE", names[0])
    assert module.micro_batches(decoder, (2, 4, 1)) == [1, 2, 4, 8]


def test_meshes_divide_the_batch():
    assert meshes(4, 8, False) == []
    assert meshes(8, 8, False) == [(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1)]
    assert (2, 2, 2) in meshes(4, 8, True)


@pytest.mark.parametrize("topology", ["v9", "v9:2x2", "cpu:2", "cpu"])
def test_what_cannot_be_searched(topology):
    with pytest.raises(UsageError):
        search_plans(PAGE, topology)
