"""Compares the images of a packed system with those of the original, for the same captions and seeds.

    python benchmarks/packed.py --system runs/demo --packed shapes --num 64

Of the mean absolute difference of the pixels of an image, in levels of 255, prints the median, mean and maximum over
images, the mean for images of another seed (baseline), and the share of images in which it is below one level.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import numpy as np
from common import emit

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.evaluation import examples
from dalle2_jax.evaluation.intervals import in_percent, wilson
from dalle2_jax.system.system import load


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/packed.py --system runs/demo --packed shapes"
    parser = args.make_parser("python benchmarks/packed.py", "Compares images of packed weights.", example)
    parser.add_argument("--system", required=True, type=args.system, help="the original")
    parser.add_argument("--packed", required=True, type=args.system, help="its packed copy")
    parser.add_argument("--num", type=args.positive_int, default=64, help="captions of split val (default %(default)s)")
    options = parser.parse_args()
    captions = list(examples.open_source(options.system, "decoder", "val", None, False).captions(options.num))
    one, other, reseeded = (
        load(system).text2image(captions, num=1, seed=seed).numpy.astype(int)
        for system, seed in ((options.system, 0), (options.packed, 0), (options.system, 1))
    )
    difference, baseline = (np.abs(one - images).mean(axis=(1, 2, 3)) for images in (other, reseeded))
    below = float((difference < 1).mean())
    emit(
        images=len(one),
        median=float(np.median(difference)),
        mean=float(difference.mean()),
        largest=float(difference.max()),
        another_seed=float(baseline.mean()),
        below_one_level=in_percent(below, wilson(below, len(one))),
    )


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
