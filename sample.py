"""Generates images with a trained system; the same as ``dalle2 sample``. See ``python sample.py --help``."""

from dalle2_jax import cli

if __name__ == "__main__":
    cli.start("sample")
