"""Plots one image as upsamplers see it in training: 4 times smaller, blurred, noised or degraded, and enlarged.

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
from dalle2_jax.data.images import decoding, degradation
from dalle2_jax.files import captioned_grid, write_png
from dalle2_jax.stages import images as device_images

FACTOR, COLUMNS = 4, 6
LEVELS = (0.05, 0.1, 0.2, 0.4)
"""Of noise augmentation, in shares of the cosine schedule's steps."""


def sheet(image: np.ndarray, seed: int) -> np.ndarray:
    """Returns what networks are shown of an image uint8[S, S, 3]: a row blurred and noised, and a row a recipe."""
    schedule = diffusion.make_schedule("cosine", 1000)
    small = device_images.resize(device_images.to_float(image[None]), image.shape[0] // FACTOR)
    noise = jax.random.normal(jax.random.key(seed), (1, *image.shape))
    shown = [upsampled(small), upsampled(device_images.gaussian_blur(small, 0.6))]
    for level in LEVELS:
        t = jnp.full(1, round(level * schedule.num_steps) - 1)
        shown.append(diffusion.q_sample(schedule, shown[0], t, noise))
    names = ["means of 4x4 pixels", "3x3 blur, sigma 0.6", *(f"noise_augmentation {level}" for level in LEVELS)]
    rng = np.random.default_rng(seed)
    for name, recipe in degradation.RECIPES.items():
        for sample in range(COLUMNS):
            degraded = degradation.degrade(image, FACTOR, recipe, rng)
            shown.append(upsampled(device_images.to_float(degraded[None])))
            names.append(f"{name}, sample {sample + 1}")
    return captioned_grid([np.asarray(device_images.to_uint8(one))[0] for one in shown], names, COLUMNS)


def upsampled(small: jax.Array) -> jax.Array:
    """Returns small images float32[B, h, w, 3] at the size of the result, as ``UpsamplerStage`` makes them."""
    size, height, width, channels = small.shape
    return jax.image.resize(small, (size, FACTOR * height, FACTOR * width, channels), "cubic")


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=pathlib.Path, help="a file (default: scikit-learn's temple)")
    parser.add_argument("--side", type=int, default=192, help="of the square cut from it (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="PNG file to write")
    options = parser.parse_args()
    image = decoding.decode(options.image.read_bytes()) if options.image else load_sample_image("china.jpg")
    write_png(options.out, sheet(decoding.crop(decoding.fit(image, options.side), options.side), options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
