"""The sampling loop by theory: on data of known law every sampler must reach what is known."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic_denoisers import gaussian, keys, normals, ode_solution, relative_error
from public_recordings import RECORDED, recorded_network

from dalle2_jax.diffusion import Level, SamplerConfig, integrate, make_schedule, predictor, respace, sample
from dalle2_jax.types import UserError

SCHEDULE = make_schedule("cosine", 1000)
SAMPLERS = {
    "ddim": SamplerConfig("ddim", clip=None),
    "ddim_eta_0.5": SamplerConfig("ddim", eta=0.5, clip=None),
    "ddim_eta_1": SamplerConfig("ddim", eta=1.0, clip=None),
    "ddpm_small": SamplerConfig("ddpm", clip=None),
    "ddpm_large": SamplerConfig("ddpm", variance="fixed_large", clip=None),
}


def run(config, denoiser, count, shape, schedule=SCHEDULE, prediction_type="x0", seed=0, **kwargs):
    call = jax.jit(lambda keys: sample(schedule, config, prediction_type, denoiser, keys, shape, **kwargs))
    return np.asarray(call(keys(count, seed)))


@pytest.mark.parametrize(("name", "steps"), [("cosine", 1), ("linear", 3), ("cosine", "fast27")])
@pytest.mark.parametrize("config", SAMPLERS.values(), ids=SAMPLERS)
def test_a_point_mass_is_reproduced(config, steps, name):
    schedule = make_schedule(name, 1000)
    point = normals((1, 2, 3))
    for prediction_type in ("eps", "x0", "v"):
        x_0 = run(
            dataclasses.replace(config, steps=steps),
            gaussian(schedule, prediction_type, point, 0.0),
            2,
            (2, 3),
            schedule,
            prediction_type,
        )
        # x_0 from eps is divided by the signal rate, which magnifies the rounding of a lone first step.
        magnified = 1 / schedule.signal_rate[-1] if steps == 1 and prediction_type == "eps" else 1
        np.testing.assert_allclose(x_0, np.broadcast_to(point, (2, 2, 3)), atol=1e-5 + 2e-7 * magnified)


@pytest.mark.parametrize("steps", [5, 20, 100])
def test_ddpm_with_the_large_variance_is_exact_for_standard_normal_data(steps):
    """Every reverse step is then the true one but the last, which leaves out the noise beta_0."""
    config = SamplerConfig("ddpm", steps=steps, variance="fixed_large", clip=None)
    x_0 = run(config, gaussian(SCHEDULE, "x0", 0.0, 1.0), 16, (4096,))
    np.testing.assert_allclose(x_0.mean(), 0, atol=4 / 256)
    np.testing.assert_allclose(x_0.var(), SCHEDULE.alpha_bar[0], rtol=0.022)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("config", SAMPLERS.values(), ids=SAMPLERS)
def test_gaussian_data_keep_mean_and_variance(config, name):
    mean, std = 0.7, 0.5
    schedule = make_schedule(name, 1000)
    config = dataclasses.replace(config, steps=200)
    x_0 = run(config, gaussian(schedule, "eps", mean, std), 16, (2048,), schedule, "eps")
    np.testing.assert_allclose(x_0.mean(), mean, atol=0.015)
    np.testing.assert_allclose(x_0.std(), std, rtol=0.04)


@pytest.mark.parametrize("prediction_type", ["eps", "x0", "v"])
def test_ddim_converges_with_order_one(prediction_type):
    mean, std = 0.7, 0.5
    x_T = normals((64, 1))
    exact = ode_solution(SCHEDULE, mean, std, x_T)
    errors = []
    for steps in (20, 40, 80, 160):
        config = SamplerConfig("ddim", steps=steps, clip=None)
        denoiser = gaussian(SCHEDULE, prediction_type, mean, std)
        x_0 = run(config, denoiser, 64, (1,), SCHEDULE, prediction_type, x_T=x_T)
        errors.append(np.sqrt(np.mean((x_0 - exact) ** 2)))
    orders = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(orders, 1, atol=0.15)


def test_whole_ddim_run_equals_guided_diffusion():
    recorded = RECORDED["outputs/loop/ddim_loop_eps_25_eta0/trajectory"]
    x_T = jnp.asarray(RECORDED["inputs/x_t"])
    config = SamplerConfig(steps=25)
    states = run(config, recorded_network, 5, (3, 4, 4), prediction_type="eps", x_T=x_T, trajectory=True)
    for state, expected in zip(states, recorded, strict=True):
        assert relative_error(state, expected) < 1e-5


def test_a_trajectory_ends_in_the_sample():
    config, denoiser = SamplerConfig("ddpm", steps=7), gaussian(SCHEDULE, "x0", 0.0, 0.5)
    states = run(config, denoiser, 2, (3,), trajectory=True)
    assert states.shape == (7, 2, 3)
    np.testing.assert_array_equal(states[-1], run(config, denoiser, 2, (3,)))
    assert len(np.unique(states[:, 0, 0])) == 7


@pytest.mark.parametrize("name", ["ddim", "ddim_eta_0.5", "ddpm_small"])
def test_an_image_is_the_same_in_any_batch(name):
    config = dataclasses.replace(SAMPLERS[name], steps=10)
    denoiser = gaussian(SCHEDULE, "eps", 0.2, 0.5)
    call = jax.jit(lambda keys: sample(SCHEDULE, config, "eps", denoiser, keys, (4, 4)))
    everyone = keys(4)
    whole = call(everyone)
    np.testing.assert_array_equal(whole, np.concatenate([call(everyone[:2]), call(everyone[2:])]))
    assert len(np.unique(np.asarray(whole)[:, 0, 0])) == 4


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_noise_is_fresh_at_every_step(name):
    """With a network that says x_0 = 0 the state is noise alone; successive draws must not repeat."""
    config = SamplerConfig(name, steps=5, eta=1.0 if name == "ddim" else 0.0)
    states = run(config, lambda x_t, t: jnp.zeros_like(x_t), 1, (4096,), trajectory=True)[:-1, 0]
    correlation = np.corrcoef(np.diff(states, axis=0))
    schedule = respace(SCHEDULE, 5)
    # From x_{t-1} = d x_t + sigma z with independent z, in closed form.
    covariance = np.zeros((5, 5))
    covariance[0, 0] = 1.0
    for i, index in enumerate(range(4, 0, -1)):
        d, variance = schedule.posterior_mean_x_t[index], schedule.posterior_variance[index]
        covariance[i + 1, : i + 1] = covariance[: i + 1, i + 1] = d * covariance[i, : i + 1]
        covariance[i + 1, i + 1] = d**2 * covariance[i, i] + variance
    differences = np.diff(np.eye(5)[1:], axis=0)
    expected = differences @ covariance @ differences.T
    scale = np.sqrt(np.diag(expected))
    np.testing.assert_allclose(correlation, expected / np.outer(scale, scale), atol=0.07)


def test_changing_seed_or_eta_compiles_nothing_and_the_network_is_traced_once():
    traces = []

    def denoiser(x_t, t):
        traces.append(t.shape)
        return gaussian(SCHEDULE, "eps", 0.2, 0.5)(x_t, t)

    config = SamplerConfig(steps=10)
    call = jax.jit(lambda keys, eta: sample(SCHEDULE, config, "eps", denoiser, keys, (3,), eta=eta))
    pictures = [call(keys(2, seed), jnp.float32(eta)) for seed, eta in [(0, 0.0), (0, 0.5), (1, 1.0)]]
    assert traces == [(2,)]
    assert not np.allclose(pictures[0], pictures[1])
    np.testing.assert_allclose(pictures[0], run(SamplerConfig(steps=10), denoiser, 2, (3,), prediction_type="eps"))


@pytest.mark.parametrize("config", [SamplerConfig(steps=5), SamplerConfig("ddpm", steps=5)], ids=["ddim", "ddpm"])
@pytest.mark.parametrize(("clip", "bound"), [(1.0, 1.0), (3.0, 3.0), (None, 5.0)])
def test_clip_bounds_x_0(config, clip, bound):
    config = dataclasses.replace(config, clip=clip)
    x_0 = run(config, lambda x_t, t: jnp.full_like(x_t, 5.0), 2, (3,))
    np.testing.assert_allclose(x_0, bound, rtol=1e-5)


def test_clipping_x_0_moves_eps_so_that_x_t_stays():
    level = Level(jnp.int32(500), *(jnp.float32(rate[500]) for rate in (SCHEDULE.signal_rate, SCHEDULE.noise_rate)))
    predict = predictor("eps", lambda x_t, t: -3 * jnp.ones_like(x_t), lambda x_0: jnp.clip(x_0, -1, 1))
    x_t = normals((2, 5))
    x_0, eps = predict(x_t, level)
    assert np.abs(x_0).max() == 1
    np.testing.assert_allclose(level.signal_rate * x_0 + level.noise_rate * eps, x_t, atol=1e-6)


def test_a_multistep_solver_of_two_evaluations_fits_the_loop():
    """Adams-Bashforth on dx_hat / dsigma_hat = eps: more exact than DDIM, which is Euler's method."""

    class Row(NamedTuple):
        level: Level
        signal_rate_prev: Any
        step: Any  # change of noise rate / signal rate
        weight: Any  # of the extrapolation from the step before

    class AdamsBashforth:
        def rows(self, schedule):
            ratio = np.append(0.0, schedule.noise_rate / schedule.signal_rate)
            step = np.diff(ratio)
            weight = np.append(0.5 * step[:-1] / step[1:], 0.0)
            tables = np.sqrt(schedule.alpha_bar_prev), -step, weight
            return Row(schedule.levels, *(table.astype(np.float32) for table in tables))

        def init(self, x_T):
            return jnp.zeros_like(x_T)

        def step(self, predict, x_t, row, noise, carry):
            _, eps = predict(x_t, row.level)
            slope = eps + row.weight * (eps - carry)
            return row.signal_rate_prev * (x_t / row.level.signal_rate + row.step * slope), eps

    mean, std, x_T = 0.7, 0.5, normals((64, 1))
    schedule = make_schedule("linear", 1000)
    denoiser = gaussian(schedule, "eps", mean, std)
    x_0 = integrate(AdamsBashforth(), respace(schedule, 100), predictor("eps", denoiser), keys(64), x_T)
    euler = run(SamplerConfig(steps=100, clip=None), denoiser, 64, (1,), schedule, "eps", x_T=x_T)
    exact = ode_solution(schedule, mean, std, x_T)
    assert np.abs(x_0 - exact).max() < 0.3 * np.abs(euler - exact).max()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "dimd"}, "did you mean 'ddim'"),
        ({"name": "ddpm", "eta": 0.5}, "'ddpm' has no eta"),
        ({"eta": 1.5}, "from 0 to 1"),
        ({"variance": "fixed_tiny"}, "unknown variance"),
        ({"clip": 0.0}, "positive"),
    ],
)
def test_impossible_samplers_say_what_to_do(fields, says):
    with pytest.raises(UserError, match=says) as error:
        SamplerConfig(**fields)
    assert "\n" not in str(error.value)


def test_traced_eta_is_refused_where_there_is_none():
    with pytest.raises(UserError, match="'ddpm' has no eta"):
        run(SamplerConfig("ddpm", steps=2), lambda x_t, t: x_t, 1, (1,), eta=jnp.float32(0.5))


def test_more_steps_than_the_schedule_has():
    with pytest.raises(UserError, match="at most 1000"):
        run(SamplerConfig(steps=1001), lambda x_t, t: x_t, 1, (1,))
