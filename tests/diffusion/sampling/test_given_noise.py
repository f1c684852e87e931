"""Sampling with given noise: the same loop, for any noise, so that other implementations can be compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic_denoisers import gaussian, keys, normals

from dalle2_jax import rng
from dalle2_jax.diffusion import SAMPLERS, SamplerConfig, SamplingOptions, make_schedule, sample

SCHEDULE, STEPS, SHAPE = make_schedule("cosine", 100), 6, (3,)
NETWORK = gaussian(SCHEDULE, "v", 0.2, 0.5)


def own_noise(keys):
    """Returns the noise that the loop samples for these keys: x_T, and the noise of every step, the noisiest first."""
    x_T = rng.normal(jax.vmap(lambda key: rng.stream(key, "x_T"))(keys), SHAPE)
    streams = jax.vmap(lambda key: rng.stream(key, "noise"))(keys)
    numbers = range(STEPS - 1, -1, -1)
    turns = [rng.normal(jax.vmap(lambda key, i=i: rng.at_step(key, i))(streams), SHAPE) for i in numbers]
    return x_T, jnp.stack(turns)


@pytest.mark.parametrize("name", SAMPLERS)
def test_given_noise_is_taken_as_the_key_s_own(name):
    """As an array, with or without that of the last step, which takes none, and as a function of the step."""
    config, own, traces = SamplerConfig(name, f"logsnr{STEPS}", eta=0.7 if name == "ddim" else 0.0), keys(2), []
    x_T, noise = own_noise(own)

    @jax.jit
    def generate(keys, **given):
        traces.append(given.keys())
        return sample(SCHEDULE, config, "v", NETWORK, keys, SHAPE, options=SamplingOptions(**given))

    expected = generate(own)
    others = keys(2, seed=9)
    np.testing.assert_allclose(generate(others, x_T=x_T, noise=noise), expected, atol=1e-6)
    traces.clear()
    changed = generate(others, x_T=x_T, noise=noise + 1.0)  # other noise compiles nothing
    assert not traces
    noisy = name in ("ddpm", "ddim", "dpmpp_2m_sde")
    assert np.allclose(changed, expected) != noisy
    np.testing.assert_allclose(generate(others, x_T=x_T, noise=noise[:-1]), expected, atol=1e-6)

    @jax.jit
    def by_step(keys, x_T, noise):
        given = {"x_T": x_T, "noise": lambda turn: noise[turn]}
        return sample(SCHEDULE, config, "v", NETWORK, keys, SHAPE, options=SamplingOptions(**given))

    np.testing.assert_allclose(by_step(others, x_T, noise), expected, atol=1e-6)


def test_given_noise_of_repaint_has_one_row_a_turn():
    """With a jump of 2 steps taken twice the plan is longer than the schedule: steps that renoise sample noise too."""
    config = SamplerConfig("ddpm", 4)

    def generate(noise):
        given = {"x_T": normals((2, 3)), "noise": noise, "resample": (2, 2), "trajectory": True}
        return sample(SCHEDULE, config, "v", NETWORK, keys(2), SHAPE, options=SamplingOptions(**given))

    turns = len(generate(None))
    assert turns > 4
    noise = normals((turns, 2, 3), seed=1)
    states = generate(noise)
    other = generate(noise.at[3].add(1.0))
    np.testing.assert_array_equal(states[:3], other[:3])
    assert not np.allclose(states[3], other[3])
