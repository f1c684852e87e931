"""Draws one picture as upsamplers see it in training: blurred, degraded, noised; ``docs/degradation.png``.

    python benchmarks/degradation.py --out docs/degradation.png
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_sample_image

from dalle2_jax import diffusion
from dalle2_jax.data import degradation, images
from dalle2_jax.files import captioned_grid, write_png
from dalle2_jax.stages import images as device_images

FACTOR, COLUMNS = 4, 6
LEVELS = (0.1, 0.2, 0.3, 0.5)
"""Of noise augmentation, in shares of the cosine schedule's steps."""


def sheet(picture: np.ndarray, seed: int) -> np.ndarray:
    """Returns the picture uint8[S, S, 3] made smaller: a row blurred and noised, and a row for each recipe."""
    schedule = diffusion.make_schedule("cosine", 1000)
    small = device_images.resize(device_images.to_float(picture[None]), picture.shape[0] // FACTOR)
    blurred = device_images.gaussian_blur(small, 0.6)
    cells = {"means of 4x4 pixels": small, "and a 3x3 blur of sigma 0.6": blurred}
    noise = jax.random.normal(jax.random.key(seed), small.shape)
    for level in LEVELS:
        t = jnp.full(1, round(level * schedule.num_steps) - 1)
        cells[f"noise augmentation {level}"] = diffusion.q_sample(schedule, small, t, noise)
    pictures = [np.asarray(device_images.to_uint8(cell))[0] for cell in cells.values()]
    names, rng = list(cells), np.random.default_rng(seed)
    for name, recipe in degradation.RECIPES.items():
        for draw in range(COLUMNS):
            pictures.append(degradation.degrade(picture, FACTOR, recipe, rng))
            names.append(f"{name}, draw {draw + 1}")
    return captioned_grid(pictures, names, COLUMNS)


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=pathlib.Path, help="a file (default: scikit-learn's temple)")
    parser.add_argument("--side", type=int, default=256, help="of the square cut from it (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="PNG file to write")
    options = parser.parse_args()
    picture = images.decode(options.picture.read_bytes()) if options.picture else load_sample_image("china.jpg")
    write_png(options.out, sheet(images.crop(images.fit(picture, options.side), options.side), options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
