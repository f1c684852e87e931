"""Fine-tunes the tiny Karlo of tests/fixtures on ``shapes`` by the real commands: the losses, a LoRA's size, pictures.

    python benchmarks/finetune_karlo.py

It is a config file too, of a run that starts from an imported system and takes what the networks are from there:

    python train.py --config benchmarks/finetune_karlo.py:decoder --config.init_from=runs/karlo --workdir runs/tuned
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from common import emit
from ml_collections import ConfigDict

from dalle2_jax import entry
from dalle2_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ("tests/fixtures/karlo_tiny", "tests/fixtures/karlo_tiny_iv/image_encoder")
COMPARED = 20
"""Logged steps at either end of a run, whose mean losses are compared."""

RUNS = {
    # run: its stage, and more words
    "prior": ("prior", ()),
    "decoder": ("decoder", ()),
    "decoder_lora": ("decoder", ("--config.lora={'rank': 1}", "--config.optim.lr=1e-2")),
}


def get_config(which: str) -> ConfigDict:
    """Returns the config of one stage; its network, its diffusion and its tokenizer are those of the system."""
    return ConfigDict(
        {
            "stage": which,
            "init_from": "",
            "seed": 0,
            "total_steps": 200,
            "batch_size": 16,
            "log_every": 1,
            "checkpoint_every": 200,
            "data": {"kind": "shapes", "resolution": 32, "max_objects": 1},
            "text": {},
            "model": {},
            "diffusion": {},
            "sampling": {"name": "ddpm", "steps": 5},
            "optim": {"lr": 2e-3, "clip_norm": 1.0, "ema_decay": 0.9},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
    )


def command(*words: object) -> float:
    """Runs ``python WORDS`` and returns its seconds. UserError with what it said where it fails."""
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"{' '.join(map(str, words))}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return time.perf_counter() - start


def losses(folder: pathlib.Path) -> tuple[float, float]:
    """Returns the mean loss of the first and of the last `COMPARED` logged steps of a run."""
    logged = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sum(logged[:COMPARED]) / COMPARED, sum(logged[-COMPARED:]) / COMPARED


def size(folder: pathlib.Path) -> int:
    """Returns the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Runs the command line."""
    entry.parser("python benchmarks/finetune_karlo.py", "Fine-tunes a tiny Karlo.", "python benchmarks/finetune_karlo.py").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        imported = root / "karlo"
        command("-m", "dalle2_jax.weights", "import", "auto", *SOURCES, imported)
        for name, (stage, words) in RUNS.items():
            system = root / name
            trained = ["train.py", "--config", f"{pathlib.Path(__file__)}:{stage}", "--workdir", system]
            seconds = command(*trained, f"--config.init_from={imported}", *words)
            before, after = losses(system / stage)
            drawn = command("sample.py", "text2image", "--system", system, "--prompt", "a red circle", "--num", 2,
                            "--upsampler_1.steps", 2, "--prior.steps", 5, "--decoder.steps", 5, "--out", root / f"{name}_out")
            emit(
                benchmark="finetune_karlo",
                run=name,
                loss_of_the_first_steps=before,
                loss_of_the_last_steps=after,
                seconds=seconds,
                sampling_seconds=drawn,
                size_of_the_stage=size(system / stage / "checkpoints") / size(imported / stage / "checkpoints"),
            )


if __name__ == "__main__":
    sys.exit(entry.guarded(main))
