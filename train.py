"""Trains one stage of a system; the same as ``dalle2 train``. See ``python train.py --help``."""

from dalle2_jax import cli

if __name__ == "__main__":
    cli.start("train")
