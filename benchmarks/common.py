"""What the benchmarks share: stages with random weights, FLOP counts, timing, one JSON line a result."""

import argparse
import importlib.util
import json
import os
import pathlib
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.config.experiment import Experiment
from dalle2_jax.errors import UsageError, UserError
from dalle2_jax.planning import flops
from dalle2_jax.stages import Stage, Variables
from dalle2_jax.types import Batch

ROOT = pathlib.Path(__file__).parents[1]

PACKAGE = {"PYTHONPATH": str(ROOT)}
"""Variables of programs that import this package."""


def program(word: str) -> str:
    """Reads the name of a program for an argument parser: an error before any process is started."""
    if shutil.which(word) is None:
        raise argparse.ArgumentTypeError(f"{word!r} is no program: give a Python as --help describes it")
    return word


def output(words: Sequence[object], environment: Mapping[str, str], folder: pathlib.Path | None = None) -> str:
    """Runs a program and returns what it prints.

    Args:
        words: the program and its arguments.
        environment: all its variables; `PACKAGE` lets it find this package.
        folder: where it runs; None: here.

    Raises:
        UserError: it fails, with the last line of its errors.
    """
    line = " ".join(map(str, words))
    done = subprocess.run([*map(str, words)], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{line.splitlines()[0]}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout


def result(words: Sequence[object], environment: Mapping[str, str], folder: pathlib.Path | None = None) -> Any:
    """Runs a program as `output` does and returns its last line, which is JSON."""
    return json.loads(output(words, environment, folder).strip().splitlines()[-1])


def command(*words: object) -> float:
    """Runs ``python WORDS`` in the repository and returns its seconds. Raises UserError if it fails."""
    start = time.perf_counter()
    output([sys.executable, *words], {**os.environ, **PACKAGE}, ROOT)
    return time.perf_counter() - start


def load_config(spec: str, overrides: list[str] = ()) -> dict[str, Any]:
    """Returns the config of FILE:STAGE with "a.b=value" overrides, as plain dicts."""
    path, _, which = spec.partition(":")
    if not pathlib.Path(path).is_file():
        raise UsageError(f"there is no config file {path}")
    module_spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    config = module.get_config(which)
    for override in overrides:
        field, _, value = override.partition("=")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        config.update_from_flattened_dict({field: tuple(parsed) if isinstance(parsed, list) else parsed})
    return config.to_dict()


def build_with_clip(spec: str, overrides: list[str] = ()) -> tuple[dict[str, Any], Stage]:
    """Returns a config and its stage; the CLIP it requires is of the same file."""
    config = load_config(spec, overrides)
    vocab_size, experiment = config["text"]["vocab_size"], Experiment.from_config(config)
    clip = None
    if "clip" in experiment.requires:
        clip = Experiment.from_config(load_config(f"{spec.partition(':')[0]}:clip")).build(vocab_size, None)
    return config, experiment.build(vocab_size, clip)


def frozen_for(stage: Stage) -> dict[str, Variables]:
    """Returns random weights for what a stage requires."""
    return {"clip": jax.jit(stage.clip.init)(jax.random.key(1))} if stage.requires else {}


def random_batch(config: dict[str, Any], size: int) -> Batch:
    """Returns a batch of noise in the shapes of a config's data."""
    random = np.random.default_rng(0)
    side, length = config["data"]["resolution"], config["text"]["context_length"]
    return {
        "image": random.integers(0, 256, (size, side, side, 3), np.uint8),
        "tokens": random.integers(4, config["text"]["vocab_size"], (size, length), np.int32),
        "mask": np.ones((size, length), bool),
    }


def count_flops(function: Callable, *args: Any) -> float:
    """Returns the floating-point operations of all matrix products and convolutions, loops unrolled.

    See ``dalle2_jax.planning.flops``.
    """
    return flops.count_flops(jax.make_jaxpr(function)(*args))


def median_seconds(run: Callable[[], Any], repeats: int, warm_up: int = 2) -> tuple[float, float]:
    """Returns (seconds of the first call, compilation included, and the median of the later ones)."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    first = time.perf_counter() - start
    for _ in range(warm_up - 1):
        jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return first, statistics.median(times)


def peak_bytes() -> int:
    """Returns the most memory that was in use: of the first device, or of the process where devices do not tell."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_rate(dtype: str, side: int | None = None) -> float:
    """Returns the FLOP/s of one large matrix product on one device, measured now: the roof of utilisation."""
    side = side or (2048 if jax.default_backend() == "cpu" else 8192)
    a = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    return 2.0 * side**3 / median_seconds(lambda: product(a), 10)[1]


def emit(**result: Any) -> None:
    """Prints one JSON line: the result, the device and the commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = jax.devices()[0].device_kind
    machine = f"{jax.device_count()} x {device if device != 'cpu' else platform.processor() or platform.machine()}"
    print(json.dumps({**result, "device": machine, "jax": jax.__version__, "commit": commit}), flush=True)
