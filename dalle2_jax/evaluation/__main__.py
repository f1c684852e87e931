"""``python -m dalle2_jax.evaluation``: what a system's pictures are worth, in numbers."""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tqdm

from dalle2_jax import build, data, entry
from dalle2_jax.data import digits as digits_data
from dalle2_jax.evaluation import attributes, bound, retrieval
from dalle2_jax.evaluation import digits as digit_reader
from dalle2_jax.files import captioned_grid, write_atomically, write_png
from dalle2_jax.generation import PRIORS, Cascade, Member, Request, Settings
from dalle2_jax.training.sharding import MeshConfig, batch_sharding, make_mesh
from dalle2_jax.types import UserError
from dalle2_jax.workdir import StageFolder

EXAMPLE = "python -m dalle2_jax.evaluation attributes --system runs/demo --num 256"


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = entry.parser("python -m dalle2_jax.evaluation", "Measures a trained system.", EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, count, help_text in (
        ("attributes", 256, "of shapes: do pictures show what their captions say? beside it, shuffled captions"),
        ("retrieval", 64, "does CLIP find each picture's caption among those of other pictures, and the reverse?"),
        ("digits", 200, "of the digits folder: is each picture read as its caption's digit?"),
    ):
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument("--system", required=True, type=pathlib.Path, help="the system's folder")
        examples = "how many examples (default %(default)s)"
        command.add_argument("--num", type=entry.positive, default=count, help=examples)
        command.add_argument("--out", type=pathlib.Path, help="folder for results.json and the grid")
        if name != "digits":
            command.add_argument("--split", default="val", help="val (default), train or compositional")
        if name != "retrieval":
            command.add_argument("--seed", type=entry.seed, default=1, help="of the samples (default %(default)s)")
            command.add_argument("--batch_size", type=entry.positive, default=64, help="pictures at a time")
            command.add_argument("--prior", choices=PRIORS, help="which, where the system has both (default diffusion)")
    for name, split, help_text in (
        ("bits_per_dim", "val", "of a stage that draws pictures: the bound on their likelihood, over every step"),
        ("moments", "train", "of a diffusion stage: the noise it predicts at each step, which variance analytic needs"),
    ):
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument("--system", required=True, type=pathlib.Path, help="the system's folder")
        command.add_argument("--stage", required=True, choices=build.DIFFUSED, help="which stage")
        command.add_argument("--num", type=entry.positive, default=64, help="how many examples (default %(default)s)")
        command.add_argument("--split", default=split, help="train, val, .. (default %(default)s)")
        command.add_argument("--seed", type=entry.seed, default=1, help="of the noise (default %(default)s)")
        command.add_argument("--batch_size", type=entry.positive, default=16, help="examples at a time")
        command.add_argument("--out", type=pathlib.Path, help="folder for results.json")
    return parser


def open_source(options: argparse.Namespace, stage: str, split: str) -> data.Source:
    """Opens a split of the data that a stage of the system was trained on."""
    config = StageFolder(options.system, stage).read_json("config.json")
    if config is None:
        raise UserError(build.missing_stage(options.system, stage))
    return build.open_source(config, split)


def check_num(options: argparse.Namespace, source: data.Source) -> None:
    """Raises UserError unless there are as many examples as --num asks for."""
    if options.num > len(source):
        raise UserError(f"--num {options.num} is more than the {len(source)} examples of split {options.split}")


def draw(options: argparse.Namespace, captions: Sequence[str]) -> np.ndarray:
    """Draws a picture for each caption with the system's own sampling, uint8[B, H, W, 3]."""
    mesh = make_mesh(MeshConfig())
    members = build.load_cascade(options.system, mesh, options.prior)
    sampling = {name: member.stage.sampling for name, member in members.items() if name != "clip"}
    cascade = Cascade(members, Settings(options.seed, sampling), batch_sharding(mesh), mesh.size)
    requests = [Request(caption, index, 0) for index, caption in enumerate(captions)]
    drawn = cascade.text2image(requests, options.batch_size)
    pictures = [picture for _, picture in tqdm.tqdm(drawn, total=len(captions), desc="drawing", unit="picture")]
    return np.stack(pictures)


def measure_attributes(options: argparse.Namespace) -> dict:
    """Draws pictures of captions never trained on and reads them."""
    source = open_source(options, "decoder", options.split)
    if not isinstance(source, data.ShapesSource):
        raise UserError("attributes are read of shapes alone; this system was trained on other data")
    check_num(options, source)
    captions = [source.caption(index) for index in range(options.num)]
    pictures = draw(options, captions)
    scenes = [source.scene(index) for index in range(options.num)]
    rates = attributes.attribute_accuracy(pictures, scenes, captions)
    print(retrieval.table(f"{options.num} {options.split} captions", rates))
    show(options, pictures, captions)
    return rates


def measure_retrieval(options: argparse.Namespace) -> dict:
    """Embeds distinct examples with CLIP and matches them."""
    clip = build.load_system(options.system, make_mesh(MeshConfig()), ("clip",))["clip"]
    source = open_source(options, "clip", options.split)
    indices = retrieval.distinct_examples(source, options.num)
    batch, _ = data.fixed_batch(source, clip.tokenizer, clip.context_length, indices)
    image_emb = clip.stage.encode_image(clip.variables, batch["image"])
    text_emb = clip.stage.read(clip.variables, batch)["text_emb"]
    rates = retrieval.recall_at_1(np.asarray(image_emb), np.asarray(text_emb))
    print(retrieval.table(f"CLIP, {len(indices)} {options.split} examples", {"recall@1": rates}))
    return rates


def measure_digits(options: argparse.Namespace) -> dict:
    """Draws digits and reads them with a classifier trained on real scans."""
    if not isinstance(open_source(options, "decoder", "train"), data.PictureSource):
        raise UserError("digits are read of the digits folder alone; this system was trained on other data")
    labels = np.arange(options.num) % 10
    captions = [digits_data.captions_of(label)[(i // 10) % 6] for i, label in enumerate(labels)]
    pictures = draw(options, captions)
    rates = digit_reader.digit_accuracy(pictures, labels)
    print(retrieval.table(f"{options.num} sampled digits", {"read right": rates}))
    show(options, pictures, captions)
    return rates


def load_stage(options: argparse.Namespace) -> tuple[dict[str, Member], data.Source]:
    """Loads the stage of --stage with what it borrows, and opens its data."""
    names = build.needed(options.system, options.stage)
    members = build.load_system(options.system, make_mesh(MeshConfig()), names)
    source = open_source(options, options.stage, options.split)
    check_num(options, source)
    return members, source


def measure_bits_per_dim(options: argparse.Namespace) -> dict:
    """Bounds the likelihood of held-out pictures."""
    members, source = load_stage(options)
    bits = bound.bits_per_dim(members, options.stage, source, options.num, options.batch_size, options.seed)
    print(f"{options.stage}, {options.num} {options.split} examples: {bits['total']:.4f} bits per dimension at most")
    return bits


def measure_moments(options: argparse.Namespace) -> dict:
    """Measures what Analytic-DPM needs, and stores it with the stage."""
    members, source = load_stage(options)
    moments = bound.noise_moments(members, options.stage, source, options.num, options.seed, options.batch_size)
    folder = StageFolder(options.system, options.stage)
    folder.write_json("moments.json", moments)
    print(f"{folder.path / 'moments.json'}: {options.stage} can be sampled with ddpm and variance analytic")
    return moments


def show(options: argparse.Namespace, pictures: np.ndarray, captions: Sequence[str]) -> None:
    """Writes a grid of the first pictures where --out says."""
    if options.out:
        write_png(options.out / "grid.png", captioned_grid(list(pictures[:30]), captions[:30]))


MEASURES = {
    "attributes": measure_attributes,
    "retrieval": measure_retrieval,
    "digits": measure_digits,
    "bits_per_dim": measure_bits_per_dim,
    "moments": measure_moments,
}


def main() -> None:
    """Runs the command line."""
    options = make_parser().parse_args()
    entry.enable_compilation_cache()
    result = MEASURES[options.command](options)
    if options.out:
        write_atomically(options.out / "results.json", json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(entry.guarded(main))
