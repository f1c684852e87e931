"""Noising has the stated law, the posterior is Bayes' rule, conversions are inverses; then parity."""

import jax.numpy as jnp
import numpy as np
import pytest
from analytic_denoisers import normals, relative_error
from public_recordings import (
    CASES,
    RECORDED,
    VARIANCES,
    assert_each_example_close,
    channels_last,
    recorded_network_with_variance,
    recorded_process,
)
from raised import mentions

from dalle2_jax.diffusion import (
    Level,
    from_x0_eps,
    make_schedule,
    posterior,
    q_sample,
    respace,
    to_x0_eps,
    variance,
    with_zero_terminal_snr,
)
from dalle2_jax.diffusion.process import with_x_0
from dalle2_jax.errors import UserError


def public(name):
    return jnp.asarray(RECORDED[name])


@pytest.fixture(params=CASES)
def case(request):
    return f"outputs/{request.param}", *recorded_process(request.param)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_noising_step_by_step_equals_noising_at_once(name):
    schedule = make_schedule(name, 50)
    mean, variance = 1.0, 0.0
    for i, beta in enumerate(schedule.betas):
        mean, variance = mean * np.sqrt(1 - beta), variance * (1 - beta) + beta
        t = jnp.array([i], jnp.int32)
        np.testing.assert_allclose(q_sample(schedule, jnp.ones((1, 1)), t, jnp.zeros((1, 1)))[0, 0], mean, rtol=1e-6)
        noise = q_sample(schedule, jnp.zeros((1, 1)), t, jnp.ones((1, 1)))[0, 0]
        np.testing.assert_allclose(noise, np.sqrt(variance), rtol=1e-6)


@pytest.mark.parametrize("index", [1, 5, 19])
def test_posterior_is_bayes_rule_done_numerically(index):
    schedule, x_0, x_t = respace(make_schedule("cosine", 1000), 20), 0.6, -0.4
    # p(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0) on a fine grid
    grid = np.linspace(-8, 8, 400_001)
    beta, alpha_bar_prev = schedule.betas[index], schedule.alpha_bar[index - 1]
    log_density = -((x_t - np.sqrt(1 - beta) * grid) ** 2) / (2 * beta)
    log_density -= (grid - np.sqrt(alpha_bar_prev) * x_0) ** 2 / (2 * (1 - alpha_bar_prev))
    weights = np.exp(log_density - log_density.max())
    weights /= weights.sum()
    expected_mean = (weights * grid).sum()
    expected_variance = (weights * (grid - expected_mean) ** 2).sum()

    t = jnp.array([index], jnp.int32)
    mean, variance, log_variance = posterior(schedule, jnp.full((1, 1), x_0), jnp.full((1, 1), x_t), t)
    np.testing.assert_allclose(mean[0, 0], expected_mean, rtol=1e-5)
    np.testing.assert_allclose(variance[0, 0], expected_variance, rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_variance[0, 0]), expected_variance, rtol=1e-5)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_the_posterior_of_the_first_step_is_x_0_itself(name):
    schedule, x_0, x_t = make_schedule(name, 100), normals((2, 3)), normals((2, 3), seed=1)
    mean, variance, log_variance = posterior(schedule, x_0, x_t, jnp.zeros(2, jnp.int32))
    np.testing.assert_allclose(mean, x_0, rtol=1e-6)
    assert variance.shape == (2, 1) and not variance.any()
    np.testing.assert_allclose(np.exp(log_variance), schedule.posterior_variance[1], rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["eps", "x0", "v"])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_conversions_are_inverses(name, prediction_type):
    schedule = make_schedule(name, 100)
    t = jnp.arange(0, 95, 5, dtype=jnp.int32)
    x_0, eps = normals((19, 3, 2)), normals((19, 3, 2), seed=1)
    x_t = q_sample(schedule, x_0, t, eps)
    prediction = from_x0_eps(schedule, prediction_type, x_0, eps, t)
    x_0_back, eps_back, _ = to_x0_eps(schedule, prediction_type, prediction, x_t, t)
    np.testing.assert_allclose(x_0_back, x_0, atol=1e-4)
    np.testing.assert_allclose(eps_back, eps, atol=1e-4)


def test_v_is_the_velocity_along_the_circle():
    """v = dx_t / dphi where a = cos(phi), s = sin(phi) (Salimans & Ho, appendix D)."""
    schedule = make_schedule("cosine", 100)
    x_0, eps, t = normals((5, 4)), normals((5, 4), seed=1), jnp.array([0, 20, 40, 60, 99], jnp.int32)
    phi = np.arctan2(schedule.noise_rate[np.asarray(t)], schedule.signal_rate[np.asarray(t)])[:, None]
    step = 1e-6
    x_before, x_after = (np.cos(p) * np.float64(x_0) + np.sin(p) * np.float64(eps) for p in (phi - step, phi + step))
    np.testing.assert_allclose(
        from_x0_eps(schedule, "v", x_0, eps, t), (x_after - x_before) / (2 * step), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("prediction_type", ["x0", "v"])
def test_pure_noise_is_no_obstacle_to_x_0_and_v(prediction_type):
    schedule, t = with_zero_terminal_snr(make_schedule("cosine", 100)), jnp.array([99, 99], jnp.int32)
    x_0, eps = normals((2, 5)), normals((2, 5), seed=1)
    x_t = q_sample(schedule, x_0, t, eps)
    np.testing.assert_array_equal(x_t, eps)
    pair = to_x0_eps(schedule, prediction_type, from_x0_eps(schedule, prediction_type, x_0, eps, t), x_t, t)
    np.testing.assert_allclose(pair.x_0, x_0, atol=1e-6)
    np.testing.assert_allclose(pair.eps, eps, atol=1e-6)


def test_clipping_x_0_changes_eps_so_that_x_t_stays():
    schedule, t = make_schedule("cosine", 100), jnp.array([60], jnp.int32)
    level = Level(*(jnp.asarray(table)[60] for table in schedule.levels))
    x_t, raw = normals((1, 5)), normals((1, 5), seed=2)
    pair = to_x0_eps(schedule, "eps", normals((1, 5), seed=1), x_t, t)._replace(variance=raw)
    clipped = with_x_0(pair, jnp.clip(pair.x_0, -0.5, 0.5), x_t, level)
    assert np.abs(clipped.x_0).max() == 0.5
    np.testing.assert_allclose(q_sample(schedule, clipped.x_0, t, clipped.eps), x_t, atol=1e-6)
    np.testing.assert_array_equal(clipped.variance, raw)


def test_unknown_prediction_type_offers_the_nearest():
    schedule, x, t = make_schedule("cosine", 10), jnp.zeros((1, 1)), jnp.zeros(1, jnp.int32)
    with pytest.raises(UserError, check=mentions("'x_0'", "'x0'")):
        from_x0_eps(schedule, "x_0", x, x, t)
    with pytest.raises(UserError, check=mentions("'epsilon'", "'eps'")):
        to_x0_eps(schedule, "epsilon", x, x, t)


def test_q_sample_equals_guided_diffusion(case):
    prefix, schedule, t = case
    x_t = q_sample(schedule, public("inputs/x_start"), t, public("inputs/noise"))
    assert relative_error(x_t, RECORDED[f"{prefix}/q_sample"]) < 1e-6


def test_posterior_equals_guided_diffusion(case):
    prefix, schedule, t = case
    mean, variance, log_variance = posterior(schedule, public("inputs/x_start"), public("inputs/x_t"), t)
    assert relative_error(mean, RECORDED[f"{prefix}/q_posterior/mean"]) < 1e-6
    for value, name in [(variance, "variance"), (log_variance, "log_variance_clipped")]:
        expected = RECORDED[f"{prefix}/q_posterior/{name}"]
        np.testing.assert_allclose(jnp.broadcast_to(value, expected.shape), expected, rtol=1e-6)


def test_conversions_equal_guided_diffusion(case):
    prefix, schedule, t = case
    x_t = public("inputs/x_t")
    x_0 = to_x0_eps(schedule, "eps", public("inputs/noise"), x_t, t).x_0
    eps = to_x0_eps(schedule, "x0", public("inputs/x_start"), x_t, t).eps
    for value, name in [(x_0, "predict_xstart_from_eps"), (eps, "predict_eps_from_xstart")]:
        assert_each_example_close(value, RECORDED[f"{prefix}/{name}"], 1e-5)


@pytest.mark.parametrize("prediction_type", ["eps", "x0"])
@pytest.mark.parametrize(("case_name", "variance_type"), VARIANCES)
def test_mean_of_the_reverse_step_equals_guided_diffusion(case_name, variance_type, prediction_type):
    schedule, t = recorded_process(case_name)
    x_t, network = channels_last("inputs/x_t"), recorded_network_with_variance(variance_type)
    prediction, _ = variance.split(variance_type, network(x_t, jnp.asarray(schedule.levels.timestep)[t]))
    x_0 = to_x0_eps(schedule, prediction_type, prediction, x_t, t).x_0
    for clip, predicted in enumerate([x_0, jnp.clip(x_0, -1, 1)]):
        name = f"outputs/{case_name}/{prediction_type}/{variance_type}/clip{clip}/p_mean_variance/mean"
        assert_each_example_close(posterior(schedule, predicted, x_t, t)[0], channels_last(name), 1e-5)
