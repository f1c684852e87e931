"""What run.json states of a run: its size, and with which versions, devices and source code it is trained."""

import functools
import pathlib
import platform
import subprocess
from typing import Any

import flax
import jax

import dalle2_jax
from dalle2_jax.training.loop import Job
from dalle2_jax.training.step import abstract_state


def describe(job: Job) -> dict[str, Any]:
    """Returns the config page of a run, the numbers of its examples and parameters, and its environment, as JSON."""
    params = jax.tree.leaves(abstract_state(job.stage, job.optimizer).params)
    return {
        "config": job.config,
        "examples": job.examples,
        "parameters": sum(leaf.size for leaf in params),
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """Returns versions, the kind and number of devices, and the commit, as JSON."""
    return {
        "dalle2_jax": dalle2_jax.__version__,
        "commit": source_commit(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
    }


@functools.cache
def source_commit() -> str | None:
    """Returns the commit of the source code, with "+" after it if files were changed; None for an installed package."""
    root = pathlib.Path(dalle2_jax.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    commit, changes = (_git(root, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno")))
    return None if not commit else commit + ("+" if changes else "")


def _git(root: pathlib.Path, *words: str) -> str | None:
    """Returns what a git command prints; None if it fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
