"""Trains the ablations of configs/ablations.py and measures them: JSON lines and the tables of docs/paper.md.

    python benchmarks/ablations.py --system shapes --out runs/ablations

Every network is trained by a sweep for its folder under ``--out``, shares the other stages of ``--system``, and has the
same captions and noise as the others. What is trained already is not trained again, so that a stopped run continues.
The measure is ``attributes``. All decoders together take 75 minutes on two CPU cores, the upsamplers 3.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import measured

import dalle2_jax as d2
from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.config import sweep
from dalle2_jax.errors import UserError
from dalle2_jax.evaluation.figures import Figure


class Column(NamedTuple):
    """A figure of every network of a table.

    Attributes:
      title: of the column.
      name: of the figure of measure ``attributes``.
      split: of the captions.
      decoder: fields of the decoder's section ``sampling``.
    """

    title: str
    name: str
    split: str = "val"
    decoder: tuple[tuple[str, Any], ...] = ()


class Table(NamedTuple):
    """A table of trained networks.

    Attributes:
      rows: (config of configs/ablations.py, number of the run in its sweep, title) of each network.
      columns: its figures.
    """

    rows: tuple[tuple[str, int, str], ...]
    columns: tuple[Column, ...]


UNGUIDED, GUIDED = (("guidance", 1.0),), (("guidance", 2.0),)

TABLES = {
    "decoders": Table(
        (
            ("decoder,drops", 0, "as in configs/shapes.py:decoder,adamw"),
            ("decoder,drops", 1, "the caption is never dropped"),
            ("decoder,drops", 2, "the image embedding is never dropped"),
            ("decoder,drops", 3, "neither is dropped"),
            ("decoder,without_captions", 0, "no caption in the decoder"),
            ("decoder,text_emb", 0, "CLIP's text embedding in place of the image embedding"),
            ("decoder,attention", 0, "cross-attention in place of joined attention"),
        ),
        (
            Column("all correct, `val`", "all", decoder=UNGUIDED),
            Column("the same, guidance 2", "all", decoder=GUIDED),
            Column("all correct, `compositional`", "all", "compositional", UNGUIDED),
            Column("deviation of the background, `val`", "background_std", decoder=UNGUIDED),
        ),
    ),
    "corruptions": Table(
        (
            ("upsampler_1,corruption", 0, "none"),
            ("upsampler_1,corruption", 1, "Gaussian blur, as in configs/shapes.py"),
            ("upsampler_1,corruption", 2, "Gaussian noise"),
            ("upsampler_1,corruption", 3, "BSR, light"),
            ("upsampler_1,corruption", 4, "BSR, as published"),
        ),
        (
            Column("all correct", "all"),
            Column("deviation of the background", "background_std"),
            Column("width of edges, pixels", "edge_width"),
        ),
    ),
    "variances": Table(
        (
            ("decoder,learned_variance", 0, "fixed, the posterior's"),
            ("decoder,learned_variance", 1, "learned, hybrid loss"),
        ),
        tuple(
            Column(f"{title}, {how}", name, decoder=(*UNGUIDED, ("variance", variance)))
            for how, variance in (("its own variance", "auto"), ("the posterior's", "fixed_small"))
            for title, name in (("all correct", "all"), ("background", "background_std"))
        ),
    ),
}


def train(table: Table, options: argparse.Namespace) -> Iterator[tuple[str, pathlib.Path]]:
    """Trains the networks of a table, and yields the title and system of each. UserError if a training fails."""
    for config, number, title in table.rows:
        out = options.out / config.replace(",", "_")
        outcomes = sweep.sweep(f"configs/ablations.py:{config}", out, system=options.system, only=number)
        if outcomes[number].failed:
            raise UserError(f"{outcomes[number].run.system} could not be trained; the error is above")
        yield title, outcomes[number].run.system


def measure(system: pathlib.Path, columns: tuple[Column, ...], options: argparse.Namespace) -> list[Figure]:
    """Returns the figures of a system; columns of equal settings share their images."""
    known = {}
    for setting in dict.fromkeys((column.split, column.decoder) for column in columns):
        split, decoder = setting
        sampling = {"decoder": dict(decoder)} if decoder else {}
        how = {"num": options.num, "seed": options.seed, "split": split, "sampling": sampling}
        known[setting] = d2.evaluate(system, ["attributes"], **how)
    return [known[column.split, column.decoder][f"attributes/{column.name}"] for column in columns]


def rendered(name: str, table: Table, options: argparse.Namespace) -> str:
    """Trains and measures the networks of a table, and returns it in Markdown."""
    titles = [column.title for column in table.columns]
    lines = ["| trained with | n | " + " | ".join(titles) + " |", "| --- " * (len(titles) + 2) + "|"]
    for title, system in train(table, options):
        found = measure(system, table.columns, options)
        measured.emit("ablations", dict(zip(titles, found, strict=True)), table=name, row=title)
        lines.append(f"| {title} | {found[0].n} | " + " | ".join(map(str, found)) + " |")
    return "\n".join(lines) + "\n"


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    example = "python benchmarks/ablations.py --system shapes --out runs/ablations"
    parser = measured.make_parser("ablations", "Trains and measures ablations.", example)
    parser.add_argument("--out", type=args.path, required=True, help="folder of the networks")
    parser.add_argument("--only", choices=TABLES, help="make one table")
    parser.add_argument("--num", type=args.positive_int, default=256, help="captions (default %(default)s)")
    return parser


def main() -> None:
    """Runs the command line."""
    options = make_parser().parse_args()
    for name in [options.only] if options.only else TABLES:
        measured.publish(name, rendered(name, TABLES[name], options), options.page)


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
