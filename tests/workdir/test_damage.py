"""Damage to a system on disk is found before it is used; what is no damage leaves everything as it is."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_system
from orbax.checkpoint import v1 as ocp
from raised import mentions
from tiny_checkpoints import abstract, save, trees

from dalle2_jax.config.experiment import Experiment
from dalle2_jax.errors import SystemWarning, UserError
from dalle2_jax.run import build_job
from dalle2_jax.system import load
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.workdir import digests, orbax_io
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.folder import StageFolder

EARLIER = Path(__file__).parents[1] / "fixtures/checkpoint_without_digests"
"""A stage as it was written before there were digests: step 3."""


@pytest.fixture(autouse=True)
def no_grace(monkeypatch):
    monkeypatch.setattr(orbax_io, "GRACE", 0.05)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = StageFolder(tmp_path_factory.mktemp("template"), "prior")
    folder.write_json("config.json", {"seed": 0})
    save(folder, 1, 2)
    return folder


@pytest.fixture
def folder(template, tmp_path):
    """A stage with the checkpoints of steps 1 and 2."""
    shutil.copytree(template.root, tmp_path, dirs_exist_ok=True)
    return StageFolder(tmp_path, "prior")


def files(folder, step):
    return sorted(path for path in (folder.path / f"checkpoints/{step}").rglob("*") if path.is_file())


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def contents(folder):
    return {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


def largest(folder, step, tree):
    return max((path for path in files(folder, step) if tree in path.parts), key=lambda path: path.stat().st_size)


# --- checkpoints ------------------------------------------------------------------------------


def test_every_file_of_a_checkpoint_has_a_digest(folder):
    """Of arrays, of orbax's and tensorstore's own files, and of the data position."""
    path = folder.path / "checkpoints/2"
    assert {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "process_0"} < {
        file.name for file in files(folder, 2)
    }
    for file in files(folder, 2):
        if file.name != digests.NAME and file.stat().st_size:
            flip(file)
            with pytest.raises(digests.Damaged):
                digests.check(path)
            flip(file)
    assert digests.check(path)


def test_a_checkpoint_written_as_an_import_has_digests(tmp_path):
    folder = StageFolder(tmp_path, "prior")
    Checkpoints(folder).save_lean(0, {"ema": {"w": np.arange(2.0**17, dtype=np.float32)}})
    wanted = {"ema": {"w": jax.ShapeDtypeStruct((2**17,), jnp.float32, sharding=jnp.zeros(1).sharding)}}
    assert Checkpoints(folder).restore(wanted).step == 0
    flip(largest(folder, 0, "ema"), 2**18)
    with pytest.raises(UserError, check=mentions("stage prior", folder.path / "checkpoints/0", "ema/ocdbt.process_0")):
        Checkpoints(folder).restore(wanted)
    with digests.unverified(skip=True):
        read = Checkpoints(folder).restore(wanted).trees["ema"]["w"]
    assert (np.asarray(read) != np.arange(2.0**17)).sum() == 1, "without its digest nobody would know"


@pytest.mark.parametrize("name", ["arrays", "data position"])
def test_a_flipped_bit_falls_back_to_the_checkpoint_before(folder, name):
    if name == "arrays":
        flip(largest(folder, 2, "params"), 200)
    else:
        path = folder.path / "checkpoints/2/_CHECKPOINT_METADATA"
        path.write_text(path.read_text().replace('"position": 16', '"position": 17'))
    restored = Checkpoints(folder).restore(abstract())
    assert (restored.step, restored.data_state) == (1, {"position": 8})
    [message] = restored.skipped
    assert "checkpoints/2" in message and "\n" not in message


def test_damage_to_trees_that_are_not_read_is_no_matter(folder):
    flip(largest(folder, 2, "params"))
    assert Checkpoints(folder).restore(abstract("ema", "stats")).step == 2


def test_a_checkpoint_of_an_earlier_version_loads_with_a_warning(tmp_path):
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    folder = StageFolder(tmp_path, "prior")
    with pytest.warns(SystemWarning, match="no digests"):
        restored = Checkpoints(folder).restore(abstract())
    assert (restored.step, restored.data_state, restored.skipped) == (3, {"position": 24}, ())
    jax.tree.map(np.testing.assert_array_equal, restored.trees, trees(3))
    with digests.unverified(skip=True):
        Checkpoints(folder).restore(abstract())  # a warning would be an error
    save(folder, 4)
    assert Checkpoints(folder).restore(abstract()).step == 4


def test_a_checkpoint_appears_with_its_digests_or_not_at_all(folder, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(digests, "write", fail)
    with pytest.raises(UserError, check=mentions(folder.path, os.strerror(errno.ENOSPC))):
        save(folder, 3)
    assert folder.latest_step() == 2
    monkeypatch.undo()
    save(folder, 3)
    assert sorted(os.listdir(folder.path / "checkpoints")) == ["2", "3"]


@pytest.mark.parametrize("left", ["3.unfinished", "3.unfinished.orbax-checkpoint-tmp", "1.removed"])
def test_what_a_killed_process_left_is_cleared(folder, left):
    os.rename(folder.path / "checkpoints/1", folder.path / "checkpoints" / left)
    assert folder.latest_step() == 2
    save(folder, 3)
    assert sorted(os.listdir(folder.path / "checkpoints")) == ["2", "3"]


def test_damaged_checkpoints_are_set_aside_and_never_deleted(folder):
    flip(largest(folder, 2, "ema"))
    shutil.copytree(folder.path / "checkpoints/2", folder.root / "copy")
    assert Checkpoints(folder).restore(abstract()).step == 1
    for number in range(3):
        shutil.copytree(folder.root / "copy", folder.path / "checkpoints/2", dirs_exist_ok=True)
        place = folder.path / "checkpoints/2"
        damaged = {path.relative_to(place): path.read_bytes() for path in files(folder, 2)}
        Checkpoints(folder).discard_after(1)
        aside = folder.path / "checkpoints" / ("2.damaged" if number == 0 else f"2.damaged-{number + 1}")
        found = {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()}
        assert found == damaged
    assert folder.latest_step() == 1


# --- what is no damage --------------------------------------------------------------------------


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


PASSING = {
    "no memory": MemoryError(),
    "no permission": PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    "input/output": OSError(errno.EIO, os.strerror(errno.EIO)),
    "as tensorstore says it": ValueError(
        "PERMISSION_DENIED: Error opening file: [OS error 13: EACCES Permission denied]"
    ),
    "as XLA says it": RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),
}


@pytest.mark.parametrize("error", PASSING.values(), ids=PASSING)
@pytest.mark.parametrize("with_digests", [True, False])
def test_an_error_that_may_pass_is_one_line_and_touches_nothing(folder, monkeypatch, error, with_digests):
    if not with_digests:
        for step in (1, 2):
            (folder.path / f"checkpoints/{step}" / digests.NAME).unlink()
    before = contents(folder)
    monkeypatch.setattr(ocp, "load_checkpointables", raising(error))
    with pytest.raises(UserError, check=mentions(folder.path / "checkpoints/2")) as raised:
        Checkpoints(folder).restore(abstract())
    assert "checkpoints/1" not in str(raised.value)
    assert contents(folder) == before


@pytest.mark.parametrize("error", [PASSING["no memory"], PASSING["input/output"]])
def test_an_error_while_digests_are_compared_touches_nothing(folder, monkeypatch, error):
    before = contents(folder)
    monkeypatch.setattr(os, "preadv", raising(error))
    with pytest.raises(UserError, check=mentions(folder.path / "checkpoints/2")):
        Checkpoints(folder).restore(abstract())
    assert contents(folder) == before


def test_a_sound_checkpoint_that_cannot_be_loaded_is_not_damaged(folder):
    """One of other shapes, say."""
    wanted = {"params": {"other": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=jnp.zeros(1).sharding)}}
    with pytest.raises(UserError, check=mentions(folder.path / "checkpoints/2", "init_from")) as raised:
        Checkpoints(folder).restore(wanted)
    assert "checkpoints/1" not in str(raised.value)


def test_a_file_of_an_earlier_version_that_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(ocp, "load_checkpointables", raising(ValueError("it does not decode")))
    monkeypatch.setattr(os, "preadv", raising(OSError(errno.EIO, os.strerror(errno.EIO))))
    shutil.copytree(tmp_path / "prior/checkpoints/3", tmp_path / "prior/checkpoints/2")
    with pytest.raises(UserError, check=mentions("checkpoints/3", os.strerror(errno.EIO))) as raised:
        Checkpoints(StageFolder(tmp_path, "prior")).restore(abstract())
    assert "checkpoints/2" not in str(raised.value)


def test_a_folder_that_cannot_be_listed_is_not_empty(folder, monkeypatch):
    monkeypatch.setattr(os, "listdir", raising(PermissionError(errno.EACCES, os.strerror(errno.EACCES))))
    with pytest.raises(PermissionError):
        Checkpoints(folder).restore(abstract())


# --- links, modes, small files ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["metrics.tmp", "checkpoints", "checkpoints/2/ema/d/0", "checkpoints/3.unfinished", "tokenizer", "samples/1.png"],
)
@pytest.mark.parametrize("dangling", [False, True])
def test_links_in_a_stage_folder_are_rejected(folder, tmp_path, name, dangling):
    outside = tmp_path / "outside"
    (outside / "7").mkdir(parents=True)
    (outside / "7" / "file").write_text("kept")
    path = folder.path / name
    if name == "checkpoints":
        shutil.rmtree(path)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(tmp_path / "nowhere" if dangling else outside)
    for action in (folder.reject_links, lambda: Checkpoints(folder).restore(abstract()), lambda: save(folder, 8)):
        with pytest.raises(UserError, check=mentions(path, "symbolic link")):
            action()
    assert (outside / "7" / "file").read_text() == "kept" and os.listdir(outside) == ["7"]


def test_a_run_and_a_load_reject_links_before_anything_else(tmp_path):
    """The folder has a link, and nothing else that either asks for."""
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/tokenizer").symlink_to(tmp_path)
    mesh = make_mesh(MeshConfig())
    for action in (
        lambda: build_job(
            Experiment.from_config(tiny_system.get_config("clip")),
            tmp_path,
            "tiny_system.py:clip",
        ),
        lambda: load.load_stage(tmp_path, "clip", mesh),
        lambda: load.describe_clip(StageFolder(tmp_path, "clip")),
    ):
        with pytest.raises(UserError, check=mentions(tmp_path / "clip/tokenizer", "symbolic link")):
            action()
    assert os.listdir(tmp_path) == ["clip"] and os.listdir(tmp_path / "clip") == ["tokenizer"]


def test_a_stage_may_be_a_link(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/prior").symlink_to("../prior")
    linked = StageFolder(tmp_path / "other", "prior")
    linked.reject_links()
    assert Checkpoints(linked).restore(abstract()).step == 2


@pytest.mark.parametrize(("umask", "of_file", "of_folder"), [(0o002, 0o664, 0o775), (0o077, 0o600, 0o700)])
def test_everything_follows_the_umask(tmp_path, umask, of_file, of_folder):
    folder, before = StageFolder(tmp_path, "prior"), os.umask(umask)
    try:
        folder.write_json("config.json", {})
        save(folder, 1)
    finally:
        os.umask(before)
    for path in folder.path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (of_folder if path.is_dir() else of_file), path


def test_changed_small_files_are_reported(folder):
    (folder.path / "tokenizer").mkdir()
    (folder.path / "tokenizer/merges").write_text("a b")
    folder.record("tokenizer")
    folder.warn_if_changed()  # a warning would be an error
    for name in ("config.json", "tokenizer/merges"):
        flip(folder.path / name, 0)
        with pytest.warns(SystemWarning, match=f"{folder.path} .*{name}"):
            folder.warn_if_changed()
        flip(folder.path / name, 0)
    (folder.path / "config.json").write_text(json.dumps({"seed": 1}))
    with digests.unverified(skip=True):
        folder.warn_if_changed()
    (folder.path / digests.NAME).unlink()
    folder.warn_if_changed()
