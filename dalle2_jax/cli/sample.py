"""``dalle2 sample``, and ``python sample.py``: generates and edits images with a trained system."""

import argparse
from typing import TYPE_CHECKING, Annotated, Any

from dalle2_jax.cli import args
from dalle2_jax.cli.stage_options import add_stage_options, as_option, stage_settings
from dalle2_jax.errors import ConfigError, UsageError, UserError
from dalle2_jax.ranges import BatchSize, Range

if TYPE_CHECKING:
    from dalle2_jax.system.images import Images
    from dalle2_jax.system.system import System

PRIORS = ("diffusion", "ar")

EXAMPLE = 'python sample.py text2image --system runs/demo --prompt "a large red circle" --num 4 --out out/'
COMMANDS = {
    # command: (what it does, an example, images per caption or image by default)
    "text2image": ("generate images from captions", f"{EXAMPLE} --decoder.guidance 3 --decoder.steps 50", 4),
    "variations": (
        "generate images with the CLIP embedding of an image",
        "python sample.py variations --system runs/demo --image in.png --eta 0.7 --out out/",
        4,
    ),
    "mix": (
        "generate images from a weighted mean of the embeddings of images and captions",
        'python sample.py mix --system runs/demo --image a.png --caption "a blue star" --weight 1 --weight 0.5 '
        "--out out/",
        4,
    ),
    "interpolate": (
        "generate the images on a path through images and captions",
        "python sample.py interpolate --system runs/demo --image a.png --image b.png --frames 8 --animate webp "
        "--out out/",
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
    "typographic_probe": (
        "compare CLIP's labels and the variations of an image with and without a word on it",
        'python sample.py typographic_probe --system runs/demo --image in.png --word square --label "a red circle" '
        '--label "a red square" --out out/',
        3,
    ),
    "outpaint": (
        "extend an image beyond its edges",
        "python sample.py outpaint --system runs/demo --image in.png --left 32 --right 32 --out out/",
        4,
    ),
    "inpaint": (
        "regenerate the white region of a mask",
        "python sample.py inpaint --system runs/demo --image in.png --mask mask.png "
        '--prompt "a small red star" --out out/',
        4,
    ),
}

EMBED_CAPTIONS = ("text2image", "mix", "interpolate", "inpaint", "outpaint")
"""Commands that make image embeddings of captions."""

MARGINS = ("left", "right", "top", "bottom")
"""Sides on which an image is extended, in the order of ``System.outpaint``."""

SEQUENCES = ("interpolate", "text_diff")
"""Commands whose images are the frames of a sequence."""

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
    _add_sequences(commands)
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
    negative = "a caption that guidance moves away from, in place of no caption"
    command.add_argument("--negative", type=caption, default="", help=negative)
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


def _add_prior(commands: _Commands) -> None:
    """Adds how captions become image embeddings."""
    candidates = "embeddings sampled per image, of which the closest to the caption is used (default 2)"
    for name in EMBED_CAPTIONS:
        prior = "which prior, if the system has both (default diffusion); none is --image_emb text"
        commands[name].add_argument("--prior", choices=(*PRIORS, "none"), help=prior)
        read = args.number(Annotated[int, Range(1, 1_000)])
        commands[name].add_argument("--prior.candidates", type=read, help=candidates)
        alone = name in ("text2image", "inpaint", "outpaint")
        sources = ("prior", "text", "none") if alone else ("prior", "text")
        text = "the image embedding of a caption: sampled from the prior (default), or its text embedding"
        text += ", or none: the decoder is conditioned on the caption only" if alone else ""
        commands[name].add_argument("--image_emb", choices=sources, help=text)


def _add_images(commands: _Commands) -> None:
    for name in ("variations", "reconstruct"):
        text = "an image file, cropped to a square; may be repeated"
        commands[name].add_argument("--image", type=args.path, required=True, action="append", help=text)
    for name in ("mix", "interpolate"):
        text = "an image file, cropped to a square; may be repeated"
        commands[name].add_argument("--image", type=args.path, action="append", default=[], help=text)
        text = "a caption, after the images; may be repeated"
        commands[name].add_argument("--caption", type=caption, action="append", default=[], help=text)
    for name in ("text_diff", "typographic_probe", "inpaint", "outpaint"):
        text = "an image file" if name in ("inpaint", "outpaint") else "an image file, cropped to a square"
        commands[name].add_argument("--image", type=args.path, required=True, help=text)
    inversion = "invert the last step too, up to pure noise; reconstructions are better without it"
    for name in ("variations", "interpolate", "text_diff", "reconstruct"):
        commands[name].add_argument("--whole_inversion", action="store_true", help=inversion)


def _add_edits(commands: _Commands) -> None:
    eta = "start from the noise that DDIM inversion finds: 0 reconstructs the image (default: fresh noise)"
    for name in ("variations", "interpolate"):
        commands[name].add_argument("--eta", type=args.fraction, help=eta)
    weight = "a number for each image and then each caption, in order; negative ones move away (default: all alike)"
    commands["mix"].add_argument("--weight", type=args.finite_float, action="append", help=weight)
    text = "a caption of the image; of several the mean is taken (default: the direction of --to alone)"
    commands["text_diff"].add_argument("--from", type=caption, action="append", help=text)
    commands["text_diff"].add_argument("--to", type=caption, required=True, help="a caption of what it becomes")
    theta = "rotation of the last frame, as a fraction of the angle, or of the first and last: 0.25,0.5 (default 0,0.5)"
    commands["text_diff"].add_argument("--theta", type=args.fraction_or_two, default=0.5, help=theta)
    depth = "share of the noise schedule that is inverted: small ones keep outlines and places (default 0.2)"
    commands["text_diff"].add_argument("--depth", type=args.fraction, default=0.2, help=depth)
    counts = "decode the projection on so many principal components, for each number, as 20,30,40"
    commands["reconstruct"].add_argument("--components", type=args.positive_ints, default=(), help=counts)
    even = "place the frames where neighbours are about equally far apart; takes about 5 times as long"
    commands["interpolate"].add_argument("--even", action="store_true", help=even)
    lpips = {
        "reconstruct": "folder of an imported LPIPS: the distance to the image is printed too",
        "interpolate": "folder of an imported LPIPS: the distance that --even makes equal (default: of pixels)",
    }
    for name, text in lpips.items():
        commands[name].add_argument("--lpips", type=args.path, metavar="DIR", help=text)
    mask = "an image of the same size: white where the image is regenerated"
    commands["inpaint"].add_argument("--mask", type=args.path, required=True, help=mask)
    resample = "repeat every stretch of JUMP steps TIMES times (RePaint), which fits the new part better: 10,5"
    for name in ("inpaint", "outpaint"):
        commands[name].add_argument("--resample", type=args.int_pair, metavar="JUMP,TIMES", help=resample)
    for side in MARGINS:
        read, text = args.number(Annotated[int, Range(0, 8_192)]), f"pixels to add, {side} (default 0)"
        commands["outpaint"].add_argument(f"--{side}", type=read, default=0, help=text)
    probe = commands["typographic_probe"]
    probe.add_argument("--word", required=True, type=caption, help="the word that is pasted on the image")
    label = "a caption that CLIP compares the image with; give two or more"
    probe.add_argument("--label", type=caption, action="append", default=[], help=label)
    size = "width of the word's label over that of the image (default 0.8)"
    probe.add_argument("--size", type=args.fraction, default=0.8, help=size)


def _add_sequences(commands: _Commands) -> None:
    lengths = {
        "interpolate": "images from each image or caption to the next, both included (default 8)",
        "text_diff": "images from the first to the last rotation (default 8)",
    }
    for name in SEQUENCES:
        read = args.number(Annotated[int, Range(2, 1_000)])
        commands[name].add_argument("--frames", type=read, default=8, help=lengths[name])
        text = "write an animation too, animation.webp or animation.gif"
        commands[name].add_argument("--animate", choices=("webp", "gif"), help=text)
        text = "frames per second of the animation (default 8)"
        read = args.number(Annotated[float, Range(0.1, 100)])
        commands[name].add_argument("--fps", type=read, default=8.0, help=text)


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


def image_emb_source(options: argparse.Namespace) -> str | None:
    """Returns where captions' image embeddings come from; None for a command without captions, or with none given."""
    if options.command not in EMBED_CAPTIONS:
        return None
    source = options.image_emb or ("text" if options.prior == "none" else "prior")
    if options.prior == "none" and source == "prior":
        raise UsageError("--prior none and --image_emb prior exclude each other: leave one out")
    words = {"mix": "caption", "interpolate": "caption", "inpaint": "prompt", "outpaint": "prompt"}
    given = words.get(options.command)
    return source if given is None or vars(options)[given] not in (None, []) else None


def load_system(options: argparse.Namespace) -> "System":
    """Loads the stages that the command uses."""
    from dalle2_jax.system import load
    from dalle2_jax.system.system import load as load_stages

    prior = vars(options).get("prior")
    prior = None if prior == "none" else prior
    stages = load.cascade_stages(options.system, prior, image_emb_source(options) == "prior")
    return load_stages(options.system, stages=stages, prior=prior, verify=not options.noverify)


def generate(options: argparse.Namespace) -> "Images":
    """Runs a command.

    Raises:
      UsageError: a setting that a stage does not have, or does not accept.
    """
    prompts = read_prompts(options) if options.command == "text2image" else options.prompt
    system = load_system(options)
    if not options.profile:
        return _run(options, system, prompts)
    import jax

    _run(argparse.Namespace(**{**vars(options), "out": None}), system, prompts)  # compiles
    with jax.profiler.trace(str(options.out / "profile")):
        return _run(options, system, prompts)


def _run(options: argparse.Namespace, system: "System", prompts: Any) -> "Images":
    """Runs a command with a loaded system; ``prompts`` is its caption, or its captions, or None."""
    given = vars(options)
    keywords: dict[str, Any] = {
        **stage_settings(options, list(system.stages)),
        **{name: given[name] for name in ("num", "seed", "batch_size", "negative", "out")},
        "candidates": given.get("prior.candidates"),
        "progress": True,
    }
    source = image_emb_source(options)
    if source is not None:
        keywords["image_emb"] = source
    try:
        return _edit(system, options, prompts, keywords)
    except ConfigError as error:
        raise UsageError(as_option(error)) from error


def _edit(system: "System", options: argparse.Namespace, prompt: Any, keywords: dict[str, Any]) -> "Images":
    """Calls the method of a command with its own arguments, and ``keywords`` that several commands have."""
    if options.command == "text2image":
        return system.text2image(prompt, **keywords)
    if options.command == "inpaint":
        return system.inpaint(options.image, options.mask, prompt, resample=options.resample, **keywords)
    if options.command == "outpaint":
        margins = tuple(vars(options)[side] for side in MARGINS)
        return system.outpaint(options.image, prompt, margins=margins, resample=options.resample, **keywords)
    keywords["prompt"] = prompt or ""
    if options.command == "typographic_probe":
        return system.typographic_probe(options.image, options.word, options.label, size=options.size, **keywords)
    if options.command == "mix":
        return system.mix(options.image, options.caption, weights=options.weight, **keywords)
    keywords["whole_inversion"] = options.whole_inversion
    if options.command == "reconstruct":
        return system.reconstruct(options.image, components=options.components, lpips=_lpips(options), **keywords)
    if options.command == "variations":
        return system.variations(options.image, eta=options.eta, **keywords)
    keywords["frames"] = options.frames
    if options.command == "interpolate":
        if options.lpips and not options.even:
            raise UsageError("--lpips is the distance that --even makes equal: give --even too")
        even = _lpips(options) or options.even
        return system.interpolate(options.image, options.caption, eta=options.eta, even=even, **keywords)
    keywords["prompt"] = prompt
    ends = {"theta": options.theta, "depth": options.depth}
    return system.text_diff(options.image, vars(options)["from"], options.to, **ends, **keywords)


def _lpips(options: argparse.Namespace) -> Any:
    """Returns the LPIPS that the command names; None if it names none."""
    if options.lpips is None:
        return None
    from dalle2_jax.evaluation import lpips

    return lpips.load(options.lpips)


def write_sequence(images: "Images", options: argparse.Namespace) -> None:
    """Writes strip.png, the frames side by side without captions, and the animation that the command asks for."""
    import numpy as np

    from dalle2_jax.files import write_png

    write_png(options.out / "strip.png", np.asarray(images.grid(captions=False)))
    if options.animate:
        images.animate(options.out / f"animation.{options.animate}", fps=options.fps)


def main() -> None:
    """Runs the command line."""
    options = make_parser().parse_args()
    from dalle2_jax import lock

    with lock.hold_folder(options.out):
        images = generate(options)
        if options.command in SEQUENCES:
            write_sequence(images, options)
    if options.command == "reconstruct":
        print(*images.captions, sep="\n")
    if options.command == "typographic_probe":
        for name, row in zip(("as given", f"with {options.word!r}"), images.captions[:: options.num + 1], strict=True):
            print(f"{name}: {row}")
    print(f"{len(images)} images in {options.out}, all of them in {options.out / 'grid.png'}")
