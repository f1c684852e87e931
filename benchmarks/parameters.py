"""Prints the size of each stage of the paper's config next to the paper's own figure, from shapes alone.

python benchmarks/parameters.py
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from common import build_with_clip

from dalle2_jax.cli.process import run_cli
from dalle2_jax.training.step import parameter_count

PAPER = {
    "clip": "not stated",
    "prior": "1B",
    "ar_prior": "1B",
    "decoder": "3.5B",
    "upsampler_1": "700M",
    "upsampler_2": "300M",
}
"""Model sizes of Ramesh et al. 2022, Table 3."""


def main() -> None:
    """Prints the table."""
    print(f"{'stage':<14}{'parameters':>16}  paper")
    for name, paper in PAPER.items():
        _, stage = build_with_clip(f"configs/paper.py:{name}")
        print(f"{name:<14}{parameter_count(stage):>16,}  {paper}")


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
