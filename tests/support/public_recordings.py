"""What public code computed: ../fixtures/diffusion*.npz, recorded from guided-diffusion and GLIDE.

tables/{schedule}/{respacing}/*: float64 tables. inputs/*, outputs/{schedule}/{respacing}/*: arrays
[5, 3, 4, 4], example b at index t[b] of the respaced schedule. glide/space/*: kept timesteps.
diffusion_learned.npz adds what concerns variances and the bound: outputs/.../{prediction}/{variance}/*,
bpd_loop, hybrid_grad, the likelihood of bytes (dgll) and the sampler of timesteps (lsm).
"""

import collections
import pathlib

import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion import make_schedule, respace

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"

RECORDED = collections.ChainMap(*(np.load(FIXTURES / f"{name}.npz") for name in ("diffusion", "diffusion_learned")))

CASES = {
    "cosine/none": ("cosine", 1000),
    "cosine/25": ("cosine", 25),
    "cosine/ddim50": ("cosine", "ddim50"),
    "linear/none": ("linear", 1000),
    "linear/10_10_10": ("linear", "10,10,10"),
}
"""The schedule and respacing of each recorded process."""

VARIANCES = [
    (case, variance)
    for case in CASES
    for variance in ("fixed_small", "fixed_large", "learned_range", "learned")
    if f"outputs/{case}/eps/{variance}/clip0/vb_terms_bpd" in RECORDED
]
"""The recorded processes and variances."""


def recorded_process(case):
    """Returns the schedule and the indices t [5] of a case."""
    name, spec = CASES[case]
    return respace(make_schedule(name, 1000), spec), jnp.asarray(RECORDED[f"inputs/{case}/t"].astype(np.int32))


def recorded_network(x_t, t):
    """The network of the recordings: a x + b t / 1000 + c, on [B, 3, 4, 4]."""
    a, b, c = (jnp.asarray(RECORDED[f"inputs/fake_{name}"][None, :3]) for name in "abc")
    return a * x_t + b * (t.astype(jnp.float32) / 1000).reshape(-1, 1, 1, 1) + c


def channels_last(name):
    """Returns a recorded array with its channels where networks of this package have them, [..., 4, 4, C]."""
    return jnp.asarray(np.moveaxis(RECORDED[name], -3, -1))


def recorded_network_with_variance(variance):
    """Returns the network of the recordings on [B, 4, 4, 3], with six channels where the variance is learned."""
    copies = 2 if variance in ("learned", "learned_range") else 1

    def denoiser(x_t, t):
        a, b, c = (channels_last(f"inputs/fake_{name}")[None, ..., : 3 * copies] for name in "abc")
        x_t = jnp.concatenate([x_t] * copies, axis=-1)
        return a * x_t + b * (t.astype(jnp.float32) / 1000).reshape(-1, 1, 1, 1) + c

    return denoiser


def assert_each_example_close(value, expected, tolerance):
    """Asserts |value - expected| <= tolerance max |expected|, example by example: their scales differ by 1e4."""
    value, expected = np.broadcast_to(value, expected.shape), np.asarray(expected, np.float64)
    for b, (ours, theirs) in enumerate(zip(value, expected, strict=True)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(), err_msg=f"example {b}")
