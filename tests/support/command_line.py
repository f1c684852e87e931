"""Shared by the tests of the command line: running and killing commands, damaging systems, and invalid commands."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import grain  # noqa: F401 - its flags must exist before `run_here` first restores flags
import jax
import numpy as np
import tiny_system
from absl import flags
from absl.testing import flagsaver
from raised import mentions
from tiny_system import STEPS

from dalle2_jax import signals, text
from dalle2_jax.cli.process import run_cli
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.parse import expand
from dalle2_jax.training.optim import OptimConfig, make_optimizer
from dalle2_jax.training.sharding import with_shardings
from dalle2_jax.training.step import abstract_state, state_shardings
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.folder import StageFolder

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "tests/support/tiny_system.py"
TIMEOUT = 900
"""Seconds; only a hang takes so long."""


def environment(devices=1, **more):
    """Returns the environment of commands on a number of devices, with this process's compiler flags and cache.

    They have as many threads as this process, which has one per device (eight), so that sums have the same order.
    """
    count = "--xla_force_host_platform_device_count="
    flags = [word for word in os.environ.get("XLA_FLAGS", "").split() if not word.startswith(count)]
    return {**os.environ, "XLA_FLAGS": " ".join([*flags, f"{count}{devices}"]), "NPROC": "8", **more}


def script_of(words):
    """Returns the file that ``python WORDS`` runs, and its arguments."""
    first, *rest = map(str, words)
    if first in ("-m", "dalle2"):
        return ROOT / "dalle2_jax" / "__main__.py", rest[first == "-m" :]
    return ROOT / first, rest


def run_here(*words):
    """Runs ``python WORDS`` in this process, as the main program; returns the CompletedProcess.

    Flags are restored afterwards; only output of Python itself is captured.
    """
    script, rest = script_of(words)
    out, err, code, known = io.StringIO(), io.StringIO(), 0, flagsaver.save_flag_values()
    with (
        contextlib.chdir(ROOT),
        mock.patch.object(sys, "argv", [str(script), *rest]),
        mock.patch.object(run_cli, "exit_process", sys.exit),  # which would end this process
        mock.patch.object(signals, "start_quietly", lambda: None),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)  # as Python itself does
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            flags.FLAGS.unparse_flags()
            flagsaver.restore_flag_values(known)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


@dataclasses.dataclass(frozen=True)
class InProcessRunner:
    """Runs commands in this process."""

    def run(self, *words):
        """Runs ``python WORDS`` to its end; returns the CompletedProcess."""
        return run_here(*words)

    def run_ok(self, *words):
        """Runs a command and asserts success; returns the CompletedProcess."""
        done = self.run(*words)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done

    def train(self, stage, root, *overrides):
        """Trains a stage; asserts success."""
        return self.run_ok(*train_words(stage, root, *overrides))


@dataclasses.dataclass(frozen=True)
class CommandRunner(InProcessRunner):
    """Runs commands in child processes, in one environment; its pool runs two at a time."""

    environment: dict
    pool: ThreadPoolExecutor

    def start(self, *words):
        """Starts ``python WORDS`` and returns its Popen."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=self.environment, **pipes)

    def run(self, *words):
        """Runs ``python WORDS`` to its end; returns the CompletedProcess."""
        with self.start(*words) as process:
            out, err = process.communicate(timeout=TIMEOUT)
        return subprocess.CompletedProcess(words, process.returncode, out, err)


def train_words(stage, root, *overrides):
    """Returns the words of a training command."""
    return ["train.py", "--config", f"{CONFIG}:{stage}", "--workdir", root, *overrides]


def sample_words(system, out, *words):
    """Returns the words of a sampling command."""
    return ["sample.py", "text2image", "--system", system, "--out", out, *words]


def evaluate_words(measure, system, *words):
    """Returns the words of an evaluation command."""
    return ["-m", "dalle2_jax", "evaluate", system, "--measures", measure, *words]


# --- systems on disk ----------------------------------------------------------------------


def copy_of(system, root, *stages):
    """Copies stages of a system; returns the new system's folder."""
    for stage in stages:
        shutil.copytree(system / stage, root / stage)
    return root


def contents(root):
    """Returns a digest of every file below a folder, by path."""
    return {str(path): hashlib.md5(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}


def steps_in(root, name):
    """Returns the steps of a stage's complete checkpoints."""
    folder = root / name / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def damage(system, stage, step):
    """Cuts the arrays of a checkpoint short."""
    files = [path for path in (system / stage / "checkpoints" / str(step)).rglob("d/*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def restored(root, name):
    """Reads a stage's newest checkpoint back, on one device."""
    vocab_size = text.load_tokenizer(root / "clip" / "tokenizer").vocab_size if (root / "clip").is_dir() else None
    clip = vocab_size and Experiment.from_config(tiny_system.get_config("clip").to_dict()).build(vocab_size, None)
    config = tiny_system.get_config(name).to_dict()
    stage = Experiment.from_config(config).build(vocab_size, clip)
    optimizer = make_optimizer(expand(OptimConfig, config["optim"], "optim"), STEPS)
    axes = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=axes, devices=jax.devices()[:1])
    target = with_shardings(abstract_state(stage, optimizer), state_shardings(stage, optimizer, mesh))
    return Checkpoints(StageFolder(root, name)).restore(target.trees())


def logged(root, name):
    """Returns the lines of metrics.jsonl without the timings."""
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    timings = ("examples_per_second", "data_wait")
    return [{key: value for key, value in line.items() if key not in timings} for line in lines]


def assert_same_end(root, reference, name):
    """Asserts that two runs ended alike: bitwise equal states, the same data position and log."""
    one, other = restored(root, name), restored(reference, name)
    assert one.step == other.step == STEPS and not one.skipped
    assert {"params", "ema", "opt_state"} <= one.trees.keys()
    assert jax.tree.structure(one.trees) == jax.tree.structure(other.trees)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one.trees), jax.tree.leaves(other.trees), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))
    assert one.data_state == other.data_state
    assert logged(root, name) == logged(reference, name)
    assert not [path for path in (root / name).rglob("*") if "tmp" in path.name]


# --- killing --------------------------------------------------------------------------------


def _has_logged(folder):
    file = folder / "metrics.jsonl"
    return file.exists() and file.stat().st_size


MOMENTS = {
    # when to kill: a condition on the stage's folder
    "at the start": lambda folder: (folder / "experiment.json").exists(),
    "in the first steps": _has_logged,
    "while a checkpoint is written": lambda folder: any(int(p.name.split(".")[0]) >= 8 for p in folder.glob("*/*tmp*")),
    "late": lambda folder: (folder / "checkpoints" / "16").exists(),
}


def kill_when(runner, moment, stage, root):
    """Starts training and kills it with SIGKILL at one of `MOMENTS`; returns its output."""
    process = runner.start(*train_words(stage, root))
    reached, end = MOMENTS[moment], time.monotonic() + TIMEOUT
    while process.poll() is None and not reached(root / stage):
        assert time.monotonic() < end, moment
        time.sleep(0.001)
    process.kill()
    out, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"ended before it was killed {moment}: {out}\n{err}"
    return out


# --- invalid commands -------------------------------------------------------------------------------


def assert_one_line(done, code, *facts):
    """Asserts that a command failed with one line on standard error that mentions facts, and this exit code."""
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert mentions(*facts)(done.stderr)
    assert done.returncode == code, done.stderr


def invalid_commands(system, root):
    """Returns {name: (command, facts in its error)} for invalid arguments and configs. Exit code 2."""

    def train(*overrides):
        return train_words("clip", root / "new", *overrides)

    def sample(*words):
        return sample_words(system, root / "out", "--prompt", "red", *words)

    def enlarge(*overrides):
        return train_words("upsampler_1", root / "new", *(f"--config.diffusion.{word}" for word in overrides))

    paper = ["--config", "configs/paper.py:decoder", "--out", root / "sweep"]
    return {
        "unknown stage": (train_words("decodr", root / "new"), ["'decodr'", "'decoder'"]),
        "unknown field": (train("--config.optim.lrr=3"), ["config.optim", "'lrr'", "'lr'"]),
        "unknown field at the top": (train("--config.batchsize=3"), ["'batchsize'", "'batch_size'"]),
        "wrong type": (train("--config.total_steps=many"), ["total_steps", "'many'"]),
        "value out of range": (train("--config.log_every=0"), ["config.log_every", 1, 0]),
        "variance without a hybrid loss": (
            enlarge("variance=learned"),
            ["config.diffusion", "'mse'", "'learned'", "'hybrid'"],
        ),
        "too few channels": (
            enlarge("variance=learned_range", "loss=hybrid"),
            ["'learned_range'", "model.out_channels", 6, 3],
        ),
        "unknown dtype": (train("--config.model.dtype=half"), ["config.model.dtype", "'half'"]),
        "unknown flag": (train("--wrkdir=x"), ["'wrkdir'", "workdir"]),
        "stray word": (train("please"), ["'please'"]),
        "no workdir": (["train.py", "--config", f"{CONFIG}:clip"], ["--workdir FOLDER"]),
        "empty workdir": (train_words("clip", ""), ["--workdir FOLDER"]),
        "no config": (["train.py", "--workdir", root / "new"], ["--config FILE:STAGE"]),
        "no config file": (["train.py", "--config", "cnfgs/x.py:clip", "--workdir", root / "new"], ["cnfgs/x.py"]),
        "no stage": (["train.py", "--config", CONFIG, "--workdir", root / "new"], ["FILE:STAGE"]),
        "unknown command": (["sample.py", "text2imag"], ["'text2imag'", "--help"]),
        "no out": (["sample.py", "text2image", "--system", system], ["--out"]),
        "no prompt": (sample_words(system, root / "out"), ["--prompt"]),
        "no images": (sample("--num", "0"), ["--num", 0, 1]),
        "unknown sampler": (sample("--decoder.sampler", "ddimm"), ["--decoder.*", "'ddimm'", "'ddim'"]),
        "too many steps": (sample("--decoder.steps", "5000"), ["--decoder.*", 5000, 100]),
        "nothing to guide by": (sample("--upsampler_1.text_guidance", "2"), ["--upsampler_1.*", "text_guidance"]),
        "no moments": (sample("--prior.variance", "analytic"), ["--prior.*", "noise_statistics"]),
        "stage not there": (sample("--upsampler_2.steps", "3"), ["upsampler_2"]),
        "seed of a giant": (sample("--seed", 10**20), ["--seed"]),
        "nothing to vary": (["-m", "dalle2_jax", "sweep", *paper], ["configs/paper.py", "function sweep"]),
        "nothing to measure": (evaluate_words("retrieval", system, "--num", "-1"), ["--num"]),
    }


def failures(system, root):
    """Returns {name: (command, facts in its error)} for missing or damaged systems, files and data. Exit code 1."""
    broken = broken_systems(system, root)
    file = broken["file"]
    how = f"python train.py --config {CONFIG}:"

    def sample(name):
        return sample_words(broken[name], root / "out", "--prompt", "red")

    def train(stage, name, *overrides):
        return train_words(stage, broken[name], *overrides)

    other_config = ["optim.lr", 0.001, 0.5, "another --workdir"]
    vall = evaluate_words("attributes", system, "--split", "vall")
    return {
        "no system": (sample("nowhere"), [broken["nowhere"], "train.py --workdir"]),
        "no clip yet": (train("prior", "nowhere"), ["stage clip", f"{how}clip"]),
        "missing stage": (sample("no_prior"), ["stage prior", f"{how}prior"]),
        "missing clip": (sample("no_clip"), ["stage clip", f"{how}clip"]),
        "unfinished clip": (sample("unfinished"), ["clip", f"{STEPS} of {2 * STEPS} steps", f"{how}clip"]),
        "other clip": (sample("mixed"), ["stage prior", "'deadbeef'", "train prior again"]),
        "other clip in training": (train("prior", "mixed"), ["'deadbeef'", "remove", "put back"]),
        "other config": (train_words("clip", system, "--config.optim.lr=0.5"), other_config),
        "ruined checkpoints": (train("clip", "ruined"), ["stage clip", "checkpoints"]),
        "workdir below a file": (train_words("clip", file / "x"), ["Not a directory", file / "x"]),
        "out below a file": (sample_words(system, file / "x", "--prompt", "red"), ["Not a directory", file / "x"]),
        "no prompts": (sample_words(system, root / "out", "--prompts", root / "no.txt"), ["no.txt"]),
        "no such split": (vall, ["'vall'", "compositional"]),
        "too few examples": (evaluate_words("attributes", system, "--num", "65"), ["64 examples"]),
        "bits without images": (evaluate_words("bits_per_dim", system, "--stage", "prior"), ["stage prior"]),
        "not digits": (evaluate_words("digits", system), ["digits folder"]),
    }


def broken_systems(system, root):
    """Makes copies of a system, each broken in one way; returns their folders by name."""
    names = ("nowhere", "no_prior", "no_clip", "unfinished", "mixed", "ruined", "file")
    folders = {name: root / name for name in names}
    folders["file"].write_text("not a folder")
    copy_of(system, folders["no_prior"], "clip", "decoder")
    copy_of(system, folders["no_clip"], "prior", "decoder")
    for name, path, field, value in (
        ("unfinished", "clip/experiment.json", "total_steps", 2 * STEPS),
        ("mixed", "prior/contract.json", "clip", "deadbeef"),
    ):
        file = copy_of(system, folders[name], "clip", "prior", "decoder") / path
        file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
        (file.parent / "digests.json").unlink()  # as one does after an edit
    copy_of(system, folders["ruined"], "clip")
    for step in steps_in(folders["ruined"], "clip"):
        damage(folders["ruined"], "clip", step)
    return folders
