"""Averaged weights in the memory of the host: the same run, bit for bit, with its arrays elsewhere."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from line_stage import make_job, same
from raised import mentions

from dalle2_jax.config.experiment import Experiment
from dalle2_jax.errors import ConfigError
from dalle2_jax.training.configs import HOST
from dalle2_jax.training.loop import train
from dalle2_jax.training.sharding import MeshConfig, check_host_memory, make_mesh, on_devices

CONFIG = {"stage": "clip", "data": {"kind": "shapes"}, "text": {}, "mesh": {}}


def test_a_run_with_its_average_on_the_host_is_the_same_and_resumes(tmp_path):
    wanted = train(make_job(tmp_path / "device"))
    for steps in (3, 6):
        job = make_job(tmp_path / "host", total_steps=steps)
        state = train(dataclasses.replace(job, ema_memory=HOST))
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.ema)} == {HOST}
        assert HOST not in {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)}
    same(jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, wanted))
    moved = on_devices(state)
    assert HOST not in {leaf.sharding.memory_kind for leaf in jax.tree.leaves(moved)}
    same(moved, wanted)


def test_fields_that_need_host_memory_are_named():
    experiment = Experiment.from_config({**CONFIG, "model": {"remat": "offload"}, "optim": {"ema_memory": HOST}})
    assert experiment.host_memory_fields == ("model.remat", "optim.ema_memory")
    assert Experiment.from_config({**CONFIG, "model": {}, "optim": {}}).host_memory_fields == ()
    unet = {"stage": "decoder", "data": {"kind": "shapes"}, "text": {}, "diffusion": {}, "sampling": {}, "mesh": {}}
    decoder = Experiment.from_config({**unet, "model": {"unet": {"remat": "offload", "context_dim": 16}}, "optim": {}})
    assert decoder.host_memory_fields == ("model.unet.remat",)


def test_devices_without_host_memory_are_rejected():
    check_host_memory(make_mesh(MeshConfig()), ["optim.ema_memory"])
    memories = [types.SimpleNamespace(kind="device"), types.SimpleNamespace(kind="unpinned_host")]
    device = types.SimpleNamespace(platform="abacus", addressable_memories=lambda: memories)
    mesh = types.SimpleNamespace(devices=np.array([device], object))
    check_host_memory(mesh, [])
    with pytest.raises(ConfigError, check=mentions("abacus", HOST, "unpinned_host", field="optim.ema_memory")):
        check_host_memory(mesh, ["optim.ema_memory"])
