"""DDIM inversion: the noise that generates an image, found by following the flow in reverse; then parity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic_denoisers import (
    denoiser_of,
    gaussian_law,
    keys,
    mixture_law,
    normals,
    relative_error,
)
from scheduler_recordings import INVERSIONS, Run, scheduler_input, scheduler_network
from stepping import SCHEDULES

from dalle2_jax.diffusion import (
    InverseDdim,
    SamplerConfig,
    SamplingOptions,
    integrate,
    invert,
    predictor,
    sample,
)

MIXTURE = mixture_law([0.3, 0.7], [-1.0, 0.8], [0.4, 0.25])
X_0 = jnp.concatenate([-1.0 + 0.4 * normals((10, 1)), 0.8 + 0.25 * normals((22, 1), seed=1)])


@functools.partial(jax.jit, static_argnames=("schedule", "steps", "prediction_type", "law", "skip_last"))
def there_and_back(x_0, schedule, steps, prediction_type, law, skip_last=True):
    """x_T, and x_0 sampled from it again."""
    denoiser = denoiser_of(schedule, prediction_type, law)
    x_T = invert(schedule, steps, prediction_type, denoiser, x_0, skip_last=skip_last)
    config = SamplerConfig("ddim", steps=steps, clip_sample=None)
    return x_T, sample(
        schedule, config, prediction_type, denoiser, keys(len(x_0)), x_0.shape[1:], options=SamplingOptions(x_T=x_T)
    )


def error_on_return(schedule, steps, prediction_type="eps", skip_last=True):
    _, x_0 = there_and_back(X_0, schedule, steps, prediction_type, MIXTURE, skip_last)
    return np.sqrt(np.mean((x_0 - X_0) ** 2))


@pytest.mark.parametrize(("name", "prediction_type"), [("linear", "eps"), ("cosine", "v"), ("sigmoid", "x0")])
def test_ddim_samples_an_inverted_image_again_up_to_an_error_of_order_one(name, prediction_type):
    errors = [error_on_return(SCHEDULES[name], steps, prediction_type) for steps in (20, 40, 80)]
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 1, atol=0.1)
    assert errors[-1] < 0.04


def test_leaving_out_the_last_step_returns_nearer():
    """It would go on to pure noise, dropping what signal the last level of DDIM has: here a tenth of its variance."""
    steps = "t:" + ",".join(map(str, range(0, 801, 10)))
    with_last, without = (error_on_return(SCHEDULES["cosine"], steps, skip_last=skip) for skip in (False, True))
    assert without < 0.03
    assert with_last > 3 * without


def test_inversion_goes_up_the_flow():
    """For Gaussian data the flow keeps the z-score; what is left falls with the size of the steps."""
    mean, std, schedule = 0.7, 0.5, SCHEDULES["linear"]
    law = gaussian_law([mean], [[std**2]])
    exact = schedule.signal_rate[-1] * mean + np.hypot(std * schedule.signal_rate[-1], schedule.noise_rate[-1]) * (
        (np.float64(X_0) - mean) / std
    )
    errors = []
    for steps in (50, 100, 200):
        x_T, _ = there_and_back(X_0, schedule, steps, "v", law)
        errors.append(np.abs(x_T - exact).max())
    assert errors[0] < 0.25
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2, rtol=0.15)


@pytest.mark.parametrize("steps", [2, 7])
def test_a_point_mass_returns_exactly(steps):
    _, x_0 = there_and_back(X_0, SCHEDULES["cosine"], steps, "x0", gaussian_law([0.3], [[0.0]]))
    np.testing.assert_allclose(x_0, 0.3, atol=1e-6)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_inversion_leaves_a_learned_variance_alone(variance_type):
    schedule, (x_0,) = SCHEDULES["cosine"], normals((1, 4, 3))
    plain = denoiser_of(schedule, "v", gaussian_law(np.zeros(3), np.eye(3)))
    expected = invert(schedule, 5, "v", plain, x_0)
    x_T = invert(
        schedule, 5, "v", lambda x, t: jnp.concatenate([plain(x, t), x], axis=-1), x_0, variance_type=variance_type
    )
    np.testing.assert_allclose(x_T, expected, rtol=1e-6)


@pytest.mark.parametrize("path", INVERSIONS)
def test_inversion_equals_diffusers(path):
    """diffusers tells the network the timestep it goes to, and counts as its first step one to where x_0 is."""
    run = Run(path, InverseDdim())
    predict = predictor("eps", lambda x_t, t: scheduler_network(x_t, t + 100))
    states = integrate(
        InverseDdim(),
        run.schedule,
        predict,
        keys(2),
        scheduler_input("x_0"),
        ascending=True,
        options=SamplingOptions(trajectory=True),
    )
    assert relative_error(run.trajectory[0], scheduler_input("x_0")) < 1e-6
    for state, expected in zip(states, run.trajectory[1:], strict=True):
        assert relative_error(state, expected) < 1e-5
