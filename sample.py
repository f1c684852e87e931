"""Draws pictures with a trained system: ``python sample.py text2image --help``."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import numpy as np
import tqdm

import dalle2_jax
from dalle2_jax import build, entry
from dalle2_jax.data.images import crop, decode, fit
from dalle2_jax.diffusion import SAMPLERS, Inpainting
from dalle2_jax.files import captioned_grid, write_atomically, write_png
from dalle2_jax.generation import PRIORS, Cascade, Member, Request, Settings, picture_side
from dalle2_jax.stages import ArSamplingConfig, DiffusionStage, SamplingConfig, Stage, images
from dalle2_jax.training.sharding import MeshConfig, batch_sharding, make_mesh
from dalle2_jax.types import UsageError, UserError

DIFFUSED = ("prior", "decoder", "upsampler_1", "upsampler_2")
PICTURED = DIFFUSED[1:]
BY_DIFFUSION = {
    "sampler": ("name", str),
    "steps": ("steps", str),
    "eta": ("eta", float),
    "variance": ("variance", str),
    "clip": ("clip", entry.finite),
    "threshold": ("threshold", str),
    "quantile": ("quantile", float),
    "temperature": ("temperature", entry.finite),
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


EXAMPLE = 'python sample.py text2image --system runs/demo --prompt "a large red circle" --num 4 --out out/'
EXAMPLES = {
    "text2image": f"{EXAMPLE} --decoder.guidance 3 --decoder.steps 50",
    "variations": "python sample.py variations --system runs/demo --image in.png --eta 0.7 --out out/",
    "reconstruct": "python sample.py reconstruct --system runs/demo --image in.png --decoder.steps 100 --out out/",
    "inpaint": "python sample.py inpaint --system runs/demo --image in.png --mask mask.png "
    '--prompt "a small red star" --out out/',
}


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = entry.parser("python sample.py", "Draws pictures with a trained system.", EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    says = {
        "text2image": "pictures from captions, through prior, decoder and upsamplers",
        "variations": "other pictures with a picture's CLIP embedding",
        "reconstruct": "a picture drawn again from its embedding and the noise that DDIM inversion finds",
        "inpaint": "a picture with a part drawn anew",
    }
    added = {}
    for name, text in says.items():
        added[name] = command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"example:\n  {EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_common(command, several=name == "text2image")
    for name in ("text2image", "inpaint"):
        added[name].add_argument("--prior", choices=PRIORS, help="which, where the system has both (default diffusion)")
        added[name].add_argument(
            "--prior.candidates",
            type=entry.positive,
            help="embeddings drawn, the closest to the caption kept (default: 2 by diffusion, 1 by the other prior)",
        )
    added["text2image"].add_argument("--prompts", type=pathlib.Path, help="a text file with a caption a line")
    for name in ("variations", "reconstruct"):
        _add_image(added[name], "append")
    added["variations"].add_argument(
        "--eta",
        type=entry.share,
        help="begin at the noise that DDIM inversion finds: 0 is the picture, 1 farthest off (default: fresh noise)",
    )
    for name in ("variations", "reconstruct"):
        whole = "invert the last step too, up to pure noise; left out, as is better, unless asked for"
        added[name].add_argument("--whole_inversion", action="store_true", help=whole)
    _add_image(added["inpaint"], "store")
    mask = "a picture of the same shape: white where it is drawn anew"
    added["inpaint"].add_argument("--mask", type=pathlib.Path, required=True, help=mask)
    resample = "take every stretch of JUMP steps TIMES times, so that the new fits the old (RePaint), as in 10,5"
    added["inpaint"].add_argument("--resample", type=entry.pair, metavar="JUMP,TIMES", help=resample)
    return parser


def _add_image(command: argparse.ArgumentParser, action: str) -> None:
    more = "; may be repeated" if action == "append" else ""
    text = f"a picture file, cropped to a square{more}"
    command.add_argument("--image", type=pathlib.Path, required=True, action=action, help=text)


def _add_common(command: argparse.ArgumentParser, several: bool) -> None:
    """Adds what every command has."""
    command.add_argument("--system", required=True, type=pathlib.Path, help="the system's folder, as in runs/demo")
    if several:
        command.add_argument("--prompt", action="append", help='a caption; "" draws unconditionally; may be repeated')
    else:
        command.add_argument("--prompt", help="a caption")
    command.add_argument("--num", type=entry.positive, default=4, help="pictures for each prompt or image (default 4)")
    command.add_argument("--seed", type=entry.seed, default=0, help="decides every picture (default 0)")
    command.add_argument("--batch_size", type=entry.positive, default=16, help="pictures at a time (default 16)")
    command.add_argument("--out", required=True, type=pathlib.Path, help="folder for PNGs, grid.png and samples.json")
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


def read_picture(path: pathlib.Path) -> np.ndarray:
    """Returns a picture file uint8[H, W, 3]. UserError where there is none, or it cannot be read."""
    try:
        return decode(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is {error}") from error


def square(picture: np.ndarray, side: int) -> np.ndarray:
    """Returns a picture's central square uint8[1, side, side, 3]."""
    return crop(fit(picture, side), side)[None]


def known_of(options: argparse.Namespace, members: dict[str, Member]) -> dict[str, Inpainting]:
    """Returns --image where --mask is black, at the size of each stage that draws pictures.

    A pixel of which any part is to be drawn anew is not known.
    """
    picture, mask = read_picture(options.image), read_picture(options.mask)
    if picture.shape != mask.shape:
        sizes = " and ".join(f"{other.shape[1]}x{other.shape[0]}" for other in (picture, mask))
        raise UserError(f"--image and --mask differ in size ({sizes}): make the mask for this picture")
    anew = np.where(mask.max(axis=2, keepdims=True) >= 128, 255, 0).astype(np.uint8).repeat(3, axis=2)
    if not anew.any():
        raise UserError(f"{options.mask} is black all over: paint white what is to be drawn anew")
    sides = {name: picture_side(members[name].stage) for name in PICTURED if name in members}
    return {
        name: Inpainting(images.to_float(square(picture, side)), square(anew, side)[..., :1] == 0)
        for name, side in sides.items()
    }


def load(options: argparse.Namespace, embeds: bool) -> tuple[dict[str, Member], jax.sharding.Mesh]:
    """Loads the system; ``embeds`` says whether a prior is needed."""
    mesh = make_mesh(MeshConfig())
    return build.load_cascade(options.system, mesh, getattr(options, "prior", None), embeds), mesh


def begin(
    options: argparse.Namespace, members: dict[str, Member], mesh: jax.sharding.Mesh, prompts: list[str]
) -> tuple[Cascade, Settings, list[Request]]:
    """Returns the cascade, its settings, and what is asked of it."""
    for name in (name for name, member in members.items() if member.tokenizer and name != "clip"):
        for i in members[name].tokenizer.truncated(prompts, members[name].context_length):
            room = f"the {name}'s {members[name].context_length} tokens"
            print(f"warning: prompt {i} is longer than {room}; its end is not read", file=sys.stderr)
    arguments = vars(options)
    settings = Settings(options.seed, sampling_of(members, arguments), arguments.get("prior.candidates"))
    requests = [Request(prompt, i, j) for i, prompt in enumerate(prompts) for j in range(options.num)]
    return Cascade(members, settings, batch_sharding(mesh), mesh.size), settings, requests


def embedded_side(members: dict[str, Member]) -> int:
    """Returns the side of the pictures that CLIP embeds. UserError if it cannot, or the decoder is not told."""
    if members["decoder"].stage.model.image_emb_dim is None:
        raise UserError("this system's decoder is told no picture's embedding: draw by text2image or inpaint")
    return members["clip"].stage.model.tower.image_size


def text2image(options: argparse.Namespace) -> None:
    """Draws captions."""
    prompts = read_prompts(options)
    members, mesh = load(options, embeds=True)
    cascade, settings, requests = begin(options, members, mesh, prompts)
    finish(options, members, settings, cascade, requests, cascade.text2image(requests, options.batch_size))


def inpaint(options: argparse.Namespace) -> None:
    """Draws a part of a picture anew: as the caption says, or without one, as the picture's own embedding does.

    A decoder that is told no embedding is told nothing then.
    """
    members, mesh = load(options, embeds=options.prompt is not None)
    known = known_of(options, members)
    cascade, settings, requests = begin(options, members, mesh, [options.prompt or ""])
    emb = None
    if options.prompt is None and members["decoder"].stage.model.image_emb_dim is not None:
        emb = cascade.embed(square(read_picture(options.image), embedded_side(members)))
    drawn = cascade.inpaint(requests, options.batch_size, known, options.resample, emb)
    finish(options, members, settings, cascade, requests, drawn)


def variations(options: argparse.Namespace) -> None:
    """Draws pictures with the embedding of a given one: from fresh noise, or with --eta from its own."""
    members, mesh = load(options, embeds=False)
    inverted = options.command == "reconstruct" or options.eta is not None
    if inverted:  # what is inverted is DDIM without guidance
        eta = 0.0 if options.command == "reconstruct" else options.eta
        for option, value in (("sampler", "ddim"), ("eta", eta), ("guidance", 1.0)):
            given = getattr(options, f"decoder.{option}")
            if given is not None and given != value and option != "guidance":
                raise UsageError(f"--decoder.{option} is {value} here: leave it out")
            setattr(options, f"decoder.{option}", value if given is None else given)
    files = [read_picture(path) for path in options.image]
    sides = {"clip": embedded_side(members), "decoder": picture_side(members["decoder"].stage)}
    pictures = {name: np.concatenate([square(file, side) for file in files]) for name, side in sides.items()}
    cascade, settings, requests = begin(options, members, mesh, [options.prompt or ""] * len(files))
    drawn = cascade.redraw(requests, options.batch_size, pictures, inverted, not options.whole_inversion)
    finish(options, members, settings, cascade, requests, drawn)


COMMANDS = {"text2image": text2image, "variations": variations, "reconstruct": variations, "inpaint": inpaint}


def finish(
    options: argparse.Namespace,
    members: dict[str, Member],
    settings: Settings,
    cascade: Cascade,
    requests: list[Request],
    drawn: Iterator[tuple[Request, np.ndarray]],
) -> None:
    """Writes ``OUT/<prompt or image>_<sample>.png``, ``OUT/grid.png`` and ``OUT/samples.json``."""
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = []
    for request, picture in tqdm.tqdm(drawn, total=len(requests), desc="drawing", unit="picture"):
        write_png(options.out / f"{request.index}_{request.sample}.png", picture)
        pictures.append(picture)
    files = options.image if isinstance(getattr(options, "image", None), list) else []
    captions = [request.prompt or (files[request.index].name if files else "") for request in requests]
    write_png(options.out / "grid.png", captioned_grid(pictures, captions, max(options.num, 4)))
    recorded = record(options, members, settings, cascade.candidates, requests)
    write_atomically(options.out / "samples.json", json.dumps(recorded, indent=2))
    print(f"{len(pictures)} pictures in {options.out}, all of them in {options.out / 'grid.png'}")


def record(
    options: argparse.Namespace,
    members: dict[str, Member],
    settings: Settings,
    candidates: int | None,
    requests: list[Request],
) -> dict:
    """Returns all that is needed to draw each picture again."""
    given = {name: getattr(options, name, None) for name in ("image", "mask", "eta", "resample", "whole_inversion")}
    return {
        "command": options.command,
        **{name: value for name, value in json.loads(json.dumps(given, default=str)).items() if value is not None},
        "system": str(options.system),
        "clip": members["clip"].contract.clip if "clip" in members else None,
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
    COMMANDS[options.command](options)


if __name__ == "__main__":
    sys.exit(entry.guarded(main))
