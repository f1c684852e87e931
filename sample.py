"""Draws pictures with a trained system: ``python sample.py text2image --help``."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import numpy as np
import tqdm

import dalle2_jax
from dalle2_jax import build, entry
from dalle2_jax.diffusion import SAMPLERS
from dalle2_jax.files import captioned_grid, write_atomically, write_png
from dalle2_jax.generation import PRIORS, Cascade, Member, Request, Settings
from dalle2_jax.stages import ArSamplingConfig, DiffusionStage, SamplingConfig, Stage
from dalle2_jax.training.sharding import MeshConfig, batch_sharding, make_mesh
from dalle2_jax.types import UsageError, UserError

DIFFUSED = ("prior", "decoder", "upsampler_1", "upsampler_2")
BY_DIFFUSION = {
    "sampler": ("name", str),
    "steps": ("steps", str),
    "eta": ("eta", float),
    "variance": ("variance", str),
    "clip": ("clip", entry.finite),
    "threshold": ("threshold", str),
    "quantile": ("quantile", float),
    "guidance": ("guidance", entry.finite),
    "image_guidance": ("image_guidance", entry.finite),
    "text_guidance": ("text_guidance", entry.finite),
    "guidance_schedule": ("guidance_schedule", str),
    "guidance_interval": ("guidance_interval", entry.interval),
    "guidance_rescale": ("guidance_rescale", float),
}
BY_CODES = {"dot_quantile": ("dot_quantile", float), "guidance": ("guidance", entry.finite)}
OPTIONS = {**dict.fromkeys(DIFFUSED, BY_DIFFUSION), "ar_prior": BY_CODES}
"""A stage -> its options on the command line -> the field of its sampling, and the type."""


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    example = 'python sample.py text2image --system runs/demo --prompt "a large red circle" --num 4 --out out/'
    parser = entry.parser("python sample.py", "Draws pictures with a trained system.", example)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "text2image",
        help="pictures from captions",
        description="Captions to pictures through prior, decoder and upsamplers.",
        epilog=f"example:\n  {example} --decoder.guidance 3 --decoder.steps 50",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--system", required=True, type=pathlib.Path, help="the system's folder, as in runs/demo")
    command.add_argument("--prompt", action="append", help='a caption; "" draws unconditionally; may be repeated')
    command.add_argument("--prompts", type=pathlib.Path, help="a text file with a caption a line")
    command.add_argument("--num", type=entry.positive, default=4, help="pictures for each prompt (default 4)")
    command.add_argument("--seed", type=entry.seed, default=0, help="decides every picture (default 0)")
    command.add_argument("--batch_size", type=entry.positive, default=16, help="pictures at a time (default 16)")
    command.add_argument("--out", required=True, type=pathlib.Path, help="folder for PNGs, grid.png and samples.json")
    command.add_argument("--prior", choices=PRIORS, help="which, where the system has both (default diffusion)")
    command.add_argument(
        "--prior.candidates",
        type=entry.positive,
        help="embeddings drawn, the closest to the caption kept (default: 2 by diffusion, 1 by the other prior)",
    )
    for stage, stage_options in OPTIONS.items():
        for option, (_, kind) in stage_options.items():
            command.add_argument(f"--{stage}.{option}", type=kind, metavar=option.upper(), help=argparse.SUPPRESS)
    command.add_argument_group(
        "sampling of each stage",
        f"--STAGE.OPTION, with STAGE one of {', '.join(DIFFUSED)} and OPTION one of sampler ({', '.join(SAMPLERS)}), "
        f"{', '.join(list(BY_DIFFUSION)[1:])} (docs/diffusion.md says what each does); --ar_prior.guidance and "
        "--ar_prior.dot_quantile (0.5: closeness to the caption from the upper half of the training pairs'); left out, "
        "they are as the stage's config says",
    )
    return parser


def sampling_of(
    members: dict[str, Member], arguments: dict[str, object]
) -> dict[str, SamplingConfig | ArSamplingConfig]:
    """Returns each stage's own sampling with the command line's options in place.

    Raises:
      UsageError: an option for a stage that the system does not have.
    """
    sampling = {name: member.stage.sampling for name, member in members.items() if name in OPTIONS}
    for stage, stage_options in OPTIONS.items():
        given = {
            field: arguments[f"{stage}.{option}"]
            for option, (field, _) in stage_options.items()
            if arguments[f"{stage}.{option}"] is not None
        }
        if given and stage not in sampling:
            raise UsageError(f"--{stage}.* is given but no stage {stage} is used here")
        if "name" in given:  # eta and variance in the config were those of its own sampler
            given = {"eta": 0.0, "variance": "auto", **given}
        if stage in sampling:
            sampling[stage] = checked_sampling(members[stage].stage, given)
    return sampling


def checked_sampling(stage: Stage, given: dict[str, object]) -> SamplingConfig | ArSamplingConfig:
    """Returns a stage's sampling with other values for some fields. UsageError for a value it refuses."""
    try:
        sampling = dataclasses.replace(stage.sampling, **given)
        if isinstance(stage, DiffusionStage):
            stage.check_sampling(sampling)
    except UserError as error:
        raise UsageError(f"--{stage.name}.*: {error}") from error
    return sampling


def read_prompts(options: argparse.Namespace) -> list[str]:
    """Returns the captions of --prompt and --prompts."""
    prompts = list(options.prompt or ())
    if options.prompts:
        prompts += options.prompts.read_text(encoding="utf-8").splitlines()
    if not prompts:
        raise UsageError('give --prompt "a caption" or --prompts FILE')
    return prompts


def text2image(options: argparse.Namespace) -> None:
    """Draws, and writes ``OUT/<prompt>_<sample>.png``, ``OUT/grid.png`` and ``OUT/samples.json``."""
    prompts = read_prompts(options)
    mesh = make_mesh(MeshConfig())
    members = build.load_cascade(options.system, mesh, options.prior)
    for name in (name for name, member in members.items() if member.tokenizer and name != "clip"):
        for i in members[name].tokenizer.truncated(prompts, members[name].context_length):
            room = f"the {name}'s {members[name].context_length} tokens"
            print(f"warning: prompt {i} is longer than {room}; its end is not read", file=sys.stderr)
    settings = Settings(options.seed, sampling_of(members, vars(options)), getattr(options, "prior.candidates"))
    cascade = Cascade(members, settings, batch_sharding(mesh), mesh.size)
    requests = [Request(prompt, i, j) for i, prompt in enumerate(prompts) for j in range(options.num)]
    options.out.mkdir(parents=True, exist_ok=True)
    drawn = cascade.text2image(requests, options.batch_size)
    pictures = []
    for request, picture in tqdm.tqdm(drawn, total=len(requests), desc="drawing", unit="picture"):
        write_png(options.out / f"{request.index}_{request.sample}.png", picture)
        pictures.append(picture)
    write_png(options.out / "grid.png", captioned_grid(pictures, [r.prompt for r in requests], max(options.num, 4)))
    recorded = record(options, members, settings, cascade.candidates, requests)
    write_atomically(options.out / "samples.json", json.dumps(recorded, indent=2))
    print(f"{len(pictures)} pictures in {options.out}, all of them in {options.out / 'grid.png'}")


def record(
    options: argparse.Namespace,
    members: dict[str, Member],
    settings: Settings,
    candidates: int,
    requests: list[Request],
) -> dict:
    """Returns all that is needed to draw each picture again."""
    return {
        "command": options.command,
        "system": str(options.system),
        "clip": members["clip"].contract.clip,
        "checkpoints": {name: member.step for name, member in members.items()},
        "seed": settings.seed,
        "candidates": candidates,
        "sampling": {name: dataclasses.asdict(config) for name, config in settings.sampling.items()},
        "versions": {"dalle2_jax": dalle2_jax.__version__, "jax": jax.__version__, "numpy": np.__version__},
        "pictures": [{"file": f"{r.index}_{r.sample}.png", **dataclasses.asdict(r)} for r in requests],
    }


def main() -> None:
    """Runs the command line."""
    options = make_parser().parse_args()
    entry.enable_compilation_cache()
    text2image(options)


if __name__ == "__main__":
    sys.exit(entry.guarded(main))
