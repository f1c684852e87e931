"""``dalle2 sample``, and ``python sample.py``: generates and edits images with a trained system."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from dalle2_jax.cli import args
from dalle2_jax.errors import ConfigError, UsageError, UserError
from dalle2_jax.ranges import BatchSize, Range

if TYPE_CHECKING:
    from dalle2_jax.system.images import Images
    from dalle2_jax.system.system import System

STAGES = ("prior", "decoder", "upsampler_1", "upsampler_2")
PRIORS = ("diffusion", "ar")
SAMPLERS = ("ddim", "ddpm", "euler", "heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc")

DIFFUSION_OPTIONS = {
    "sampler": ("name", str),
    "steps": ("steps", str),
    "eta": ("eta", float),
    "variance": ("variance", str),
    "clip_sample": ("clip_sample", float),
    "clip": ("clip_sample", float),  # its name in earlier versions
    "threshold": ("threshold", str),
    "quantile": ("quantile", float),
    "temperature": ("temperature", float),
    "guidance": ("guidance", float),
    "image_guidance": ("image_guidance", float),
    "text_guidance": ("text_guidance", float),
    "guidance_schedule": ("guidance_schedule", str),
    "guidance_interval": ("guidance_interval", args.interval),
    "guidance_rescale": ("guidance_rescale", float),
}
"""Option of a diffusion stage -> the field of ``SamplingConfig``, and how its value is read."""

AR_OPTIONS = {"dot_quantile": ("dot_quantile", float), "guidance": ("guidance", float)}
"""Option of the autoregressive prior -> the field of ``ArSamplingConfig``, and how its value is read."""

OPTIONS = {**dict.fromkeys(STAGES, DIFFUSION_OPTIONS), "ar_prior": AR_OPTIONS}
"""Stage -> its options, given as --STAGE.OPTION."""

EXAMPLE = 'python sample.py text2image --system runs/demo --prompt "a large red circle" --num 4 --out out/'
COMMANDS = {
    # command: (what it does, an example, images per caption or image by default)
    "text2image": ("generate images from captions", f"{EXAMPLE} --decoder.guidance 3 --decoder.steps 50", 4),
    "variations": (
        "generate images with the CLIP embedding of an image",
        "python sample.py variations --system runs/demo --image in.png --eta 0.7 --out out/",
        4,
    ),
    "interpolate": (
        "generate the images between two images",
        "python sample.py interpolate --system runs/demo --image a.png --image b.png --frames 8 --out out/",
        1,
    ),
    "text_diff": (
        "change an image by the difference between two captions",
        'python sample.py text_diff --system runs/demo --image in.png --from "a red circle" --to "a blue circle" '
        "--out out/",
        1,
    ),
    "reconstruct": (
        "generate an image again from its embedding and the noise that DDIM inversion finds",
        "python sample.py reconstruct --system runs/demo --image in.png --decoder.steps 100 --out out/",
        4,
    ),
    "inpaint": (
        "regenerate the white region of a mask",
        "python sample.py inpaint --system runs/demo --image in.png --mask mask.png "
        '--prompt "a small red star" --out out/',
        4,
    ),
}

_Commands = dict[str, argparse.ArgumentParser]


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = args.make_parser("dalle2 sample", "Generates and edits images with a trained system.", EXAMPLE)
    subparsers = parser.add_subparsers(dest="command", required=True)
    commands: _Commands = {}
    for name, (summary, example, num) in COMMANDS.items():
        commands[name] = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_common(commands[name], name == "text2image", num)
    _add_prior(commands)
    _add_images(commands)
    _add_edits(commands)
    return parser


def _add_common(command: argparse.ArgumentParser, several_prompts: bool, num: int) -> None:
    """Adds what every command has."""
    command.add_argument("--system", required=True, type=args.system, help=args.SYSTEM)
    if several_prompts:
        text = 'a caption; "" is unconditional; may be repeated'
        command.add_argument("--prompt", type=caption, action="append", help=text)
        command.add_argument("--prompts", type=args.path, help="a text file with one caption per line")
    else:
        command.add_argument("--prompt", type=caption, help="a caption")
    each = "images per prompt or image (default %(default)s)"
    command.add_argument("--num", type=args.number(Annotated[int, Range(1, 100_000)]), default=num, help=each)
    command.add_argument("--seed", type=args.seed, default=0, help="random seed (default 0)")
    batch_size = "images generated at a time (default 16)"
    command.add_argument("--batch_size", type=args.number(BatchSize), default=16, help=batch_size)
    profile = "generate the images twice, and write a trace of the second time to OUT/profile"
    command.add_argument("--profile", action="store_true", help=profile)
    command.add_argument("--noverify", action="store_true", help=args.NOVERIFY)
    command.add_argument("--out", required=True, type=args.path, help="folder for PNGs, grid.png and samples.json")
    add_stage_options(command)


def add_stage_options(command: argparse.ArgumentParser) -> None:
    """Adds --STAGE.OPTION for every stage, which `stage_settings` reads."""
    for stage, stage_options in OPTIONS.items():
        for option, (_, read) in stage_options.items():
            command.add_argument(f"--{stage}.{option}", type=read, metavar=option.upper(), help=argparse.SUPPRESS)
    command.add_argument_group(
        "sampling of each stage",
        f"--STAGE.OPTION, with STAGE one of {', '.join(STAGES)} and OPTION one of sampler ({', '.join(SAMPLERS)}), "
        f"{', '.join(list(DIFFUSION_OPTIONS)[1:])} (explained in docs/diffusion.md); --ar_prior.guidance and "
        "--ar_prior.dot_quantile (0.5 samples the dot product with the caption from the upper half of the training "
        "pairs'). The defaults are those of the stage's config",
    )


def _add_prior(commands: _Commands) -> None:
    candidates = "embeddings sampled per image, of which the closest to the caption is used (default 2; 1 for ar)"
    for name in ("text2image", "inpaint"):
        prior = "which prior, if the system has both (default diffusion)"
        commands[name].add_argument("--prior", choices=PRIORS, help=prior)
        read = args.number(Annotated[int, Range(1, 1_000)])
        commands[name].add_argument("--prior.candidates", type=read, help=candidates)


def _add_images(commands: _Commands) -> None:
    for name in ("variations", "reconstruct"):
        text = "an image file, cropped to a square; may be repeated"
        commands[name].add_argument("--image", type=args.path, required=True, action="append", help=text)
    text = "an image file, cropped to a square; give it twice"
    commands["interpolate"].add_argument("--image", type=args.path, required=True, action="append", help=text)
    for name in ("text_diff", "inpaint"):
        text = "an image file, cropped to a square"
        commands[name].add_argument("--image", type=args.path, required=True, help=text)
    inversion = "invert the last step too, up to pure noise; reconstructions are better without it"
    for name in ("variations", "interpolate", "text_diff", "reconstruct"):
        commands[name].add_argument("--whole_inversion", action="store_true", help=inversion)


def _add_edits(commands: _Commands) -> None:
    eta = "start from the noise that DDIM inversion finds: 0 reconstructs the image (default: fresh noise)"
    for name in ("variations", "interpolate"):
        commands[name].add_argument("--eta", type=args.fraction, help=eta)
    for name in ("interpolate", "text_diff"):
        frames = "images from the first to the last (default 8)"
        commands[name].add_argument(
            "--frames", type=args.number(Annotated[int, Range(2, 1_000)]), default=8, help=frames
        )
    commands["text_diff"].add_argument("--from", type=caption, required=True, help="a caption of the image")
    commands["text_diff"].add_argument("--to", type=caption, required=True, help="a caption of what it becomes")
    theta = "rotation of the last frame, as a fraction of the angle (default 0.5)"
    commands["text_diff"].add_argument("--theta", type=args.fraction, default=0.5, help=theta)
    mask = "an image of the same size: white where the image is regenerated"
    commands["inpaint"].add_argument("--mask", type=args.path, required=True, help=mask)
    resample = "repeat every stretch of JUMP steps TIMES times (RePaint), which fits the new part better: 10,5"
    commands["inpaint"].add_argument("--resample", type=args.int_pair, metavar="JUMP,TIMES", help=resample)


def caption(word: str) -> str:
    """Reads a caption, for an argument parser."""
    from dalle2_jax.system.inputs import check_caption

    try:
        check_caption(word, "it")
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return word


def read_prompts(options: argparse.Namespace) -> list[str]:
    """Returns the captions of --prompt and --prompts. UserError if the file cannot be read, or a line is no caption."""
    from dalle2_jax.reading import read_users_text
    from dalle2_jax.system.inputs import check_caption

    prompts: list[str] = list(options.prompt or ())
    for number, line in enumerate(read_users_text(options.prompts).splitlines() if options.prompts else (), 1):
        try:
            check_caption(line)
        except UsageError as error:
            raise UserError(f"{options.prompts}, line {number}: {error}") from error
        prompts.append(line)
    if not prompts:
        raise UsageError('give --prompt "a caption" or --prompts FILE')
    return prompts


def stage_settings(options: argparse.Namespace, loaded: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the settings of each stage that the command line gives, by argument of `System`'s methods.

    Raises:
      UsageError: options of a stage that is not used.
    """
    settings: dict[str, dict[str, Any]] = {}
    for stage, stage_options in OPTIONS.items():
        values = [(field, getattr(options, f"{stage}.{name}")) for name, (field, _) in stage_options.items()]
        given = {field: value for field, value in values if value is not None}
        if given and stage not in loaded:
            raise UsageError(f"--{stage}.* is given but no stage {stage} is used here")
        if given:
            settings["prior" if stage == "ar_prior" else stage] = given
    return settings


def load_system(options: argparse.Namespace) -> "System":
    """Loads the stages that the command uses."""
    from dalle2_jax.system import load
    from dalle2_jax.system.system import load as load_stages

    embeds = options.command == "text2image" or (options.command == "inpaint" and options.prompt is not None)
    prior = vars(options).get("prior")
    stages = load.cascade_stages(options.system, prior, embeds)
    return load_stages(options.system, stages=stages, prior=prior, verify=not options.noverify)


def generate(options: argparse.Namespace) -> "Images":
    """Runs a command.

    Raises:
      UsageError: a setting that a stage does not have, or does not accept.
    """
    prompts = read_prompts(options) if options.command == "text2image" else []
    system = load_system(options)
    if not options.profile:
        return _run(options, system, prompts)
    import jax

    _run(argparse.Namespace(**{**vars(options), "out": None}), system, prompts)  # compiles
    with jax.profiler.trace(str(options.out / "profile")):
        return _run(options, system, prompts)


def _run(options: argparse.Namespace, system: "System", prompts: Sequence[str]) -> "Images":
    """Runs a command with a loaded system."""
    given = vars(options)
    keywords: dict[str, Any] = {
        **stage_settings(options, list(system.stages)),
        **{name: given[name] for name in ("num", "seed", "batch_size", "out")},
        "candidates": given.get("prior.candidates"),
        "progress": True,
    }
    try:
        if options.command == "text2image":
            return system.text2image(prompts, **keywords)
        if options.command == "inpaint":
            return system.inpaint(options.image, options.mask, options.prompt, resample=options.resample, **keywords)
        keywords |= {"prompt": options.prompt or "", "whole_inversion": options.whole_inversion}
        if options.command == "reconstruct":
            return system.reconstruct(options.image, **keywords)
        if options.command == "variations":
            return system.variations(options.image, eta=options.eta, **keywords)
        keywords["frames"] = options.frames
        if options.command == "interpolate":
            return system.interpolate(options.image, eta=options.eta, **keywords)
        return system.text_diff(options.image, given["from"], options.to, theta=options.theta, **keywords)
    except ConfigError as error:
        raise UsageError(as_option(error)) from error


def as_option(error: ConfigError) -> str:
    """Returns the message of an error about a stage's setting, with the option's name in place of the field's."""
    stage, _, field = error.field.partition(".")
    message = str(error)
    if stage not in OPTIONS:
        return message
    names = {field: option for option, (field, _) in reversed(OPTIONS[stage].items())}
    if field and message.startswith(error.field):
        return f"--{stage}.{names.get(field, field)}{message.removeprefix(error.field)}"
    return f"--{stage}.*: {message.removeprefix(f'{stage}: ')}"


def main() -> None:
    """Runs the command line."""
    options = make_parser().parse_args()
    from dalle2_jax import lock

    with lock.hold_folder(options.out):
        images = generate(options)
    print(f"{len(images)} images in {options.out}, all of them in {options.out / 'grid.png'}")
