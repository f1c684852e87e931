"""What public code computed: ../fixtures/diffusion.npz, recorded from guided-diffusion and GLIDE.

tables/{schedule}/{respacing}/*: float64 tables. inputs/*, outputs/{schedule}/{respacing}/*: arrays
[5, 3, 4, 4], example b at index t[b] of the respaced schedule. glide/space/*: kept timesteps.
"""

import pathlib

import jax.numpy as jnp
import numpy as np

RECORDED = np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "diffusion.npz")

CASES = {
    "cosine/none": ("cosine", 1000),
    "cosine/25": ("cosine", 25),
    "cosine/ddim50": ("cosine", "ddim50"),
    "linear/none": ("linear", 1000),
    "linear/10_10_10": ("linear", "10,10,10"),
}
"""The schedule and respacing of each recorded process."""


def recorded_network(x_t, t):
    """The network of the recordings: a x + b t / 1000 + c, on [B, 3, 4, 4]."""
    a, b, c = (jnp.asarray(RECORDED[f"inputs/fake_{name}"][None, :3]) for name in "abc")
    return a * x_t + b * (t.astype(jnp.float32) / 1000).reshape(-1, 1, 1, 1) + c
