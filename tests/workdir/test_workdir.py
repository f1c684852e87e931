"""A system on disk: whose folder it is, and checkpoints that survive damage, kills and another mesh."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from raised import mentions
from tiny_checkpoints import abstract, save, shape_of, trees

from dalle2_jax.errors import UserError
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.claim import MAY_CHANGE, claim, difference
from dalle2_jax.workdir.folder import EXPERIMENT, StageFolder

CONFIG = {"seed": 0, "total_steps": 10, "workers": 0, "model": {"width": 8, "mult": (1, 2)}, "mesh": {"data": -1}}


def claim_again(folder, config):
    """Claims a folder as a run does."""
    claim(folder, config, folder.read_json(EXPERIMENT))


@pytest.fixture
def folder(tmp_path):
    folder = StageFolder(tmp_path, "prior")
    claim_again(folder, CONFIG)
    return folder


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


# --- whose folder -----------------------------------------------------------------------------


def test_a_new_folder_is_claimed(folder):
    assert folder.exists() and not StageFolder(folder.root, "clip").exists()
    assert folder.read_json(EXPERIMENT) == json.loads(json.dumps(CONFIG))
    assert folder.latest_step() is None and folder.read_json("contract.json") is None


def test_another_config_is_rejected_with_the_difference(folder):
    save(folder, 1)
    claim_again(folder, CONFIG)
    other = CONFIG | {"model": {"width": 16, "mult": (1, 2), "heads": 2}, "total_steps": 20}
    facts = ("model.width", 8, 16, "model.heads", "null", 2)
    with pytest.raises(UserError, check=mentions(folder.path, *facts)) as error:
        claim_again(folder, other)
    assert "total_steps" not in str(error.value) and "mult" not in str(error.value)
    assert folder.read_json(EXPERIMENT)["model"]["width"] == 8


def test_how_long_and_where_a_run_goes_may_change(folder):
    save(folder, 1)
    claim_again(folder, CONFIG | {name: 17 for name in MAY_CHANGE})
    data = {"path": "x", "parts": {"a": {"path": "y"}}}
    patient = {"path": "x", "max_rejected": 0.5, "parts": {"a": {"path": "y", "max_rejected": 0.3}}}
    assert difference({"data": data}, {"data": patient}) == []
    assert difference({"data": data}, {"data": {**patient, "path": "z"}}) == ['data.path: stored "x", requested "z"']
    assert folder.read_json(EXPERIMENT)["total_steps"] == 17
    assert difference({"model": {"workers": 1}}, {"model": {"workers": 2}})  # only at the top


def test_a_folder_without_checkpoints_is_free(folder):
    claim_again(folder, CONFIG | {"seed": 1})
    assert folder.read_json(EXPERIMENT)["seed"] == 1


@pytest.mark.parametrize("content", [b'{"seed": ', b"\xff\xfe"])
def test_damaged_json_is_named(folder, content):
    (folder.path / EXPERIMENT).write_bytes(content)
    with pytest.raises(UserError, check=mentions(folder.path / EXPERIMENT, "JSON")):
        claim_again(folder, CONFIG)


# --- checkpoints ------------------------------------------------------------------------------


def test_nothing_is_restored_from_nothing(folder):
    assert Checkpoints(folder).restore(abstract()) is None


def test_what_is_saved_is_restored(folder):
    save(folder, 3)
    restored = Checkpoints(folder).restore(abstract())
    assert (restored.step, restored.data_state, restored.skipped) == (3, {"position": 24}, ())
    same(restored.trees, trees(3))
    assert folder.latest_step() == 3


def test_one_tree_is_read_alone(folder):
    save(folder, 3)
    shutil.rmtree(folder.path / "checkpoints/3/params")
    same(Checkpoints(folder).restore(abstract("ema", "stats")).trees, {"ema": trees(3)["ema"], "stats": {}})


def test_only_the_last_are_kept(folder):
    save(folder, 1, 2, 3, 4)
    assert sorted(os.listdir(folder.path / "checkpoints")) == ["3", "4"]


def test_a_checkpoint_holds_what_was_there_when_it_was_started(folder):
    params = {"w": jnp.arange(2.0**18)}
    overwrite = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, {"params": params}, {})
    jax.block_until_ready(overwrite(params))
    checkpoints.wait()
    restored = Checkpoints(folder).restore({"params": {"w": shape_of(jnp.zeros(2**18))}})
    np.testing.assert_array_equal(restored.trees["params"]["w"], np.arange(2.0**18))


def damage(path, how):
    files = [entry for entry in path.rglob("*") if entry.is_file()]
    match how:
        case "truncated":
            for file in files:
                os.truncate(file, file.stat().st_size // 2)
        case "arrays truncated":
            largest = max((path / "params").rglob("*"), key=lambda entry: entry.is_file() and entry.stat().st_size)
            os.truncate(largest, largest.stat().st_size - 7)
        case "zeroed":
            for file in files:
                file.write_bytes(bytes(file.stat().st_size))
        case "a tree is missing":
            shutil.rmtree(path / "params")
        case "metadata is missing":
            (path / "_CHECKPOINT_METADATA").unlink()
        case "empty":
            shutil.rmtree(path)
            path.mkdir()


DAMAGES = ("truncated", "arrays truncated", "zeroed", "a tree is missing", "metadata is missing", "empty")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(folder, how):
    save(folder, 1, 2)
    damage(folder.path / "checkpoints/2", how)
    restored = Checkpoints(folder).restore(abstract())
    assert restored.step == 1 and restored.data_state == {"position": 8}
    same(restored.trees, trees(1))
    (message,) = restored.skipped
    assert mentions(folder.path / "checkpoints/2")(message)


def test_nothing_readable_is_the_users_error(folder):
    save(folder, 1, 2)
    for step in (1, 2):
        damage(folder.path / f"checkpoints/{step}", "truncated")
    with pytest.raises(UserError, check=mentions("stage prior", "checkpoints/2", "checkpoints/1")):
        Checkpoints(folder).restore(abstract())


def test_writing_goes_on_after_damaged_ones_are_set_aside(folder):
    save(folder, 1, 2, 3, keep=3)
    damage(folder.path / "checkpoints/3", "truncated")
    Checkpoints(folder).discard_after(1)
    assert sorted(os.listdir(folder.path / "checkpoints")) == ["1", "2.damaged", "3.damaged"]
    save(folder, 2, 3)
    same(Checkpoints(folder).restore(abstract()).trees, trees(3))


def test_an_interrupted_write_is_ignored_and_cleared(folder):
    save(folder, 1)
    torn = folder.path / "checkpoints/2.orbax-checkpoint-tmp"
    shutil.copytree(folder.path / "checkpoints/1", torn)
    damage(torn, "truncated")
    assert folder.latest_step() == 1
    restored = Checkpoints(folder).restore(abstract())
    assert restored.step == 1 and restored.skipped == ()
    save(folder, 2)
    assert sorted(os.listdir(folder.path / "checkpoints")) == ["1", "2"]


def test_a_checkpoint_may_be_written_again(folder):
    save(folder, 1, 2)
    checkpoints = Checkpoints(folder)
    checkpoints.save(2, trees(7), {})
    checkpoints.wait()
    same(Checkpoints(folder).restore(abstract()).trees, trees(7))


def meshed(shape, *spec):
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    return NamedSharding(mesh, PartitionSpec(*spec))


@pytest.mark.parametrize("target", [meshed((2, 2, 2), ("fsdp", "data"), "tensor"), meshed((1, 8, 1))])
@pytest.mark.sharding
def test_restores_onto_another_mesh(folder, target):
    saved = jax.device_put(trees(1)["params"]["a"], meshed((8, 1, 1), "data"))
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, {"params": saved}, {})
    checkpoints.wait()
    wanted = {"params": {"kernel": shape_of(saved["kernel"], target)}}
    kernel = Checkpoints(folder).restore(wanted).trees["params"]["kernel"]
    assert kernel.sharding.is_equivalent_to(target, 2)
    np.testing.assert_array_equal(kernel, saved["kernel"])


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(folder, capfd):
    save(folder, 1)
    checkpoints, (_, hard) = Checkpoints(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = jnp.asarray(np.random.default_rng(0).standard_normal(2**17, np.float32))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        checkpoints.save(2, {"params": {"w": noise}}, {})
        with pytest.raises(UserError, check=mentions(folder.path, os.strerror(errno.EFBIG))):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert capfd.readouterr() == ("", "")
    assert folder.latest_step() == 1
    checkpoints.wait()  # there is nothing left to wait for
    save(folder, 2)
    same(Checkpoints(folder).restore(abstract()).trees, trees(2))


def test_a_place_that_cannot_be_written_is_named(folder):
    (folder.path / "checkpoints").write_text("")
    checkpoints = Checkpoints(dataclasses.replace(folder))
    with pytest.raises(UserError, check=mentions(folder.path, os.strerror(errno.ENOTDIR))):
        checkpoints.save(1, trees(1), {})
        checkpoints.wait()


ENDS_LATE = """
import asyncio, sys
import tensorstore
import dalle2_jax.workdir.checkpoints
from dalle2_jax.cli.process.quiet import silence_libraries

silence_libraries()
promise, late = tensorstore.Promise.new()

async def ended():
    await late

async def failed():
    await asyncio.sleep(0.01)
    raise OSError("the disk is full")

async def both():
    await asyncio.gather(ended(), failed())

loop = asyncio.new_event_loop()
try:
    loop.run_until_complete(both())
except OSError:
    loop.close()
promise.set_result(0)

class Other:
    def __del__(self):
        raise RuntimeError("another mistake")

Other()
"""


def test_arrays_that_end_after_the_first_failed_say_nothing():
    done = subprocess.run([sys.executable, "-c", ENDS_LATE], capture_output=True, text=True)
    assert done.returncode == 0
    assert "loop is closed" not in done.stderr and "another mistake" in done.stderr


# --- files and folders in each other's place ----------------------------------------------------


@pytest.mark.parametrize("name", ["", "checkpoints", EXPERIMENT])
def test_a_file_where_a_folder_belongs_is_named(name, tmp_path):
    """And a folder where a file belongs: before anything is written."""
    folder = StageFolder(tmp_path, "prior")
    path = folder.path / name
    if name == EXPERIMENT:
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    read = folder.latest_step if name == "checkpoints" else lambda: claim_again(folder, CONFIG)
    with pytest.raises(UserError, check=mentions(path, "a folder" if name == EXPERIMENT else "a file")):
        read()


@pytest.mark.parametrize("content", ["[]", "3", "{", "", "[" * 200_000, b"\xff"])
def test_json_that_is_no_object_is_rejected(content, folder):
    (folder.path / "contract.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, check=mentions(folder.path / "contract.json", "JSON")):
        folder.read_json("contract.json")
