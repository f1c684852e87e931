"""One process at a time writes a folder, and what a killed one left half-made is removed by the next."""

import dataclasses
import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_system
from raised import mentions

from dalle2_jax import files, lock
from dalle2_jax.cli import evaluate as evaluation
from dalle2_jax.cli import sample
from dalle2_jax.cli.process import run_cli
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.errors import UserError
from dalle2_jax.run import locked_stage

ROOT = Path(__file__).parents[2]

HOLDER = """
import sys, time
from pathlib import Path
from dalle2_jax import lock
out = Path(sys.argv[1])
with lock.hold_folder(out), lock.unfinished(out, ".half."):
    (out / ".a.png.0123456789abcdef.part").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path/out``, and has files there that it has not finished."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_an_error_names_the_holder_of_a_folder_which_is_free_when_that_process_is_killed(tmp_path, holder):
    out = tmp_path / "out"
    since = json.loads((out / ".lock").read_text())["since"]
    with pytest.raises(UserError, check=mentions(out, f"process {holder.pid}", since, out / ".lock")):
        with lock.hold_folder(out):
            raise AssertionError
    with lock.unfinished(out, ".half.") as own:
        assert len([*out.glob(".half.*")]) == 2  # that of the living is not touched
    assert not own.exists()
    holder.kill()
    holder.wait()
    with lock.hold_folder(out), lock.unfinished(out, ".half."):
        assert json.loads((out / ".lock").read_text())["pid"] == os.getpid()
        assert len([*out.glob(".half.*")]) == 1 and not [*out.glob(".a.png*")]
    assert not [*out.iterdir()]


def test_a_lock_leaves_nothing_behind(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(KeyError), lock.hold_folder(out):
        raise KeyError
    assert not out.exists()
    with lock.hold_folder(out):
        (out / "result").write_text("x")
    assert [path.name for path in out.iterdir()] == ["result"]


def test_only_our_own_temporary_files_are_removed(tmp_path):
    random = "0123456789abcdef"
    kept = [".hidden", ".a.part", f".notes.{random}", f"b.{random}.part", ".half.elsewhere-0123abcd", ".half.user"]
    for name in kept[:4]:
        (tmp_path / name).write_text("mine")
    for name in kept[4:]:
        (tmp_path / name).mkdir()
    (tmp_path / f".half.{lock.own_mark()}0123abcd").mkdir()
    (tmp_path / f".samples.json.fedcba9876543210{files.UNFINISHED}").write_text("left")
    with lock.hold_folder(tmp_path), lock.unfinished(tmp_path, ".half."):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A lock that another host wrote, on a disk where flock does not reach other hosts."""
    monkeypatch.setattr(lock, "BEAT", 0.2)
    about = {"host": "elsewhere", "pid": 1, "since": "2026-01-01 00:00:00", "command": "train.py"}
    (tmp_path / ".lock").write_text(json.dumps(about))
    return tmp_path / ".lock"


def test_a_lock_of_another_host_is_held_as_long_as_it_is_renewed(tmp_path, elsewhere, monkeypatch):
    ticks = iter(range(1, 100))
    monkeypatch.setattr(lock.time, "sleep", lambda _: os.utime(elsewhere, (next(ticks),) * 2))
    with (
        pytest.raises(UserError, check=mentions("process 1", "elsewhere", "2026-01-01 00:00:00")),
        lock.hold_folder(tmp_path),
    ):
        raise AssertionError
    monkeypatch.undo()
    assert elsewhere.exists()


def test_a_lock_that_another_host_left_is_taken_over(tmp_path, elsewhere):
    with lock.hold_folder(tmp_path):
        assert json.loads(elsewhere.read_text())["host"] == socket.gethostname()
    assert not elsewhere.exists()


def test_disks_without_locks_are_written_and_not_swept(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    left = tmp_path / f".half.{lock.own_mark()}0123abcd"
    left.mkdir()
    with lock.hold_folder(tmp_path), lock.unfinished(tmp_path, ".half.") as folder:
        assert folder.is_dir()
    assert [*tmp_path.iterdir()] == [left]


def test_the_error_of_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, check=mentions(tmp_path / ".lock", os.strerror(errno.ENOSPC))):
        with lock.hold_folder(tmp_path):
            raise AssertionError
    assert not [*tmp_path.iterdir()]


def test_a_stage_is_trained_by_one_run_at_a_time(tmp_path):
    config = Experiment.from_config(tiny_system.get_config("prior"))
    held = mentions(tmp_path / "runs/prior", f"process {os.getpid()}")
    with locked_stage(config, tmp_path / "runs"):
        with pytest.raises(UserError, check=held):
            with locked_stage(config, tmp_path / "runs"):
                raise AssertionError
        with locked_stage(
            dataclasses.replace(config, stage="decoder"), tmp_path / "runs"
        ):  # another stage of the same system
            pass
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "prior").symlink_to(tmp_path / "runs" / "prior")
        with pytest.raises(UserError, check=held), locked_stage(config, tmp_path / "other"):
            raise AssertionError
    assert not (tmp_path / "runs").exists()


def test_what_a_killed_run_left_in_a_stage_is_removed(tmp_path):
    folder = tmp_path / "prior"
    ending = f"0123456789abcdef{files.UNFINISHED}"
    for name in (f".experiment.json.{ending}", f"samples/.00000004.png.{ending}"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("half")
    with locked_stage(Experiment.from_config(tiny_system.get_config("prior")), tmp_path):
        assert [path.name for path in folder.rglob("*")] == ["samples"]


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (sample.main, ["sample.py", "text2image", "--prompt", "red", "--system"]),
        (evaluation.main, ["evaluate", "--measures", "retrieval"]),
    ],
)
def test_results_are_written_by_one_command_at_a_time(tmp_path, monkeypatch, capsys, main, words):
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path), "--out", str(tmp_path / "out")])
    with lock.hold_folder(tmp_path / "out"):
        assert run_cli.run_cli(main) == 1
        err = capsys.readouterr().err
    assert mentions(tmp_path / "out", f"process {os.getpid()}")(err)
