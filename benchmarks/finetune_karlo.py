"""Fine-tunes the tiny Karlo of tests/fixtures on ``shapes`` by the real commands: the losses, a LoRA's size, images.

    python benchmarks/finetune_karlo.py

It is a config file too, of a run that starts from an imported system and takes what the networks are from there:

    python train.py --config benchmarks/finetune_karlo.py:decoder --config.init_from=runs/karlo --workdir runs/tuned
"""

import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from common import command, emit
from ml_collections import ConfigDict

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.config.stored import stored_experiment
from dalle2_jax.system import load
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.training.step import parameter_count
from dalle2_jax.workdir.folder import StageFolder

SOURCES = ("tests/fixtures/karlo_tiny", "tests/fixtures/karlo_tiny_iv/image_encoder")
COMPARED = 20
"""Logged steps at either end of a run, whose mean losses are compared."""

RUNS = {
    # run: its stage, and more words
    "prior": ("prior", ()),
    "decoder": ("decoder", ()),
    "decoder_lora": ("decoder", ("--config.lora={'rank': 1}", "--config.optim.lr=1e-2")),
}


FEW_STEPS = [word for stage in ("prior", "decoder", "upsampler_1") for word in (f"--{stage}.steps", 3)]
"""Sampling flags for the images of the result."""


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


def losses(folder: pathlib.Path) -> tuple[float, float]:
    """Returns the mean loss of the first and of the last `COMPARED` logged steps of a run."""
    logged = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sum(logged[:COMPARED]) / COMPARED, sum(logged[-COMPARED:]) / COMPARED


def factors(system: pathlib.Path, stage: str) -> float:
    """Returns how many parameters a LoRA has, as a part of its base's."""
    experiment = stored_experiment(StageFolder(system, stage))
    clip = load.load_stage(system, "clip", make_mesh(MeshConfig()))
    inner = experiment.build(clip.tokenizer.vocab_size, clip.stage)
    return parameter_count(experiment.trained(inner)) / parameter_count(inner)


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/finetune_karlo.py"
    args.make_parser(example, "Fine-tunes a tiny Karlo.", example).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        imported = root / "karlo"
        command("-m", "dalle2_jax", "weights", "import", "auto", *SOURCES, imported)
        for name, (stage, words) in RUNS.items():
            system = root / name
            where = ("--config", f"benchmarks/{pathlib.Path(__file__).name}:{stage}", "--workdir", system)
            seconds = command("train.py", *where, f"--config.init_from={imported}", *words)
            before, after = losses(system / stage)
            sampling = ("--prompt", "a large red circle", "--num", 2, "--out", root / "out" / name)
            command("sample.py", "text2image", "--system", system, *sampling, *FEW_STEPS)
            emit(
                benchmark="finetune_karlo",
                run=name,
                loss_of_the_first_steps=before,
                loss_of_the_last_steps=after,
                trained_part=factors(system, stage) if "lora" in name else 1.0,
                seconds=seconds,
            )


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
