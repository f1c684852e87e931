"""Each variance is what its paper says, the analytic one the truth for Gaussian data; then parity."""

import jax.numpy as jnp
import numpy as np
import pytest
from analytic_denoisers import gaussian, normals
from public_recordings import (
    VARIANCES,
    assert_each_example_close,
    channels_last,
    recorded_network_with_variance,
    recorded_process,
)
from raised import mentions

from dalle2_jax.diffusion import (
    NoiseStatistics,
    make_schedule,
    q_sample,
    respace,
    variance,
    with_zero_terminal_snr,
)
from dalle2_jax.errors import UserError

NAMES = ["linear", "scaled_linear", "cosine", "sigmoid"]
COSINE = make_schedule("cosine", 1000)


def all_log_variances(schedule, variance_type, raw=None):
    """float32[T, 1] or of raw's shape: the log-variance of every step."""
    return variance.log_variance(schedule, variance_type, raw, jnp.arange(schedule.num_steps), 2)


def small_and_large(schedule):
    """beta_tilde and beta, float64 [T, 1]; the first of beta_tilde, which is 0, as the public code has it."""
    small = schedule.betas * (1 - schedule.alpha_bar_prev) / (1 - schedule.alpha_bar)
    small[0] = small[1]
    return small[:, None], schedule.betas[:, None]


@pytest.mark.parametrize("spec", [1000, 25])
@pytest.mark.parametrize("name", NAMES)
def test_learned_range_reaches_from_beta_tilde_to_beta(name, spec):
    schedule = respace(make_schedule(name, 1000), spec)
    small, large = small_and_large(schedule)
    raw = jnp.ones((spec, 3))
    for value, expected in [(-1, small), (1, large), (0, np.sqrt(small * large)), (3, large * (large / small))]:
        log_variance = all_log_variances(schedule, "learned_range", value * raw)
        assert log_variance.shape == (spec, 3)
        np.testing.assert_allclose(np.exp(log_variance), np.broadcast_to(expected, (spec, 3)), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_fixed_variances_are_beta_tilde_and_beta(name):
    schedule = make_schedule(name, 1000)
    small, large = small_and_large(schedule)
    np.testing.assert_allclose(np.exp(all_log_variances(schedule, "fixed_small")), small, rtol=2e-6)
    fixed_large = np.exp(all_log_variances(schedule, "fixed_large"))
    np.testing.assert_allclose(fixed_large[1:], large[1:], rtol=2e-6)
    np.testing.assert_allclose(fixed_large[0], small[1], rtol=2e-6)  # as the public code has it


def test_learned_is_the_logarithm_as_it_comes():
    raw = normals((10, 3))
    np.testing.assert_array_equal(all_log_variances(respace(COSINE, 10), "learned", raw), raw)


def test_a_bfloat16_network_gets_float32_logarithms():
    schedule, raw = respace(COSINE, 10), normals((10, 3)).astype(jnp.bfloat16)
    for variance_type in ("learned", "learned_range"):
        log_variance = all_log_variances(schedule, variance_type, raw)
        assert log_variance.dtype == jnp.float32
        expected = all_log_variances(schedule, variance_type, raw.astype(jnp.float32))
        np.testing.assert_array_equal(log_variance, expected)


def test_the_second_half_of_the_channels_is_the_variance():
    output = normals((2, 4, 4, 6))
    for variance_type in ("learned", "learned_range"):
        prediction, raw = variance.split(variance_type, output)
        np.testing.assert_array_equal(prediction, output[..., :3])
        np.testing.assert_array_equal(raw, output[..., 3:])
    for variance_type in ("fixed_small", "fixed_large"):
        prediction, raw = variance.split(variance_type, output)
        np.testing.assert_array_equal(prediction, output)
        assert raw is None


def test_an_odd_channel_has_no_half():
    with pytest.raises(UserError, check=mentions("'learned'", "output channels", 3)):
        variance.split("learned", normals((2, 4, 4, 3)))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5), (-0.2, 2.0), (1.0, 0.0)])
@pytest.mark.parametrize("spec", [1000, 50, "karras10"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_analytic_variance_is_the_true_one_for_gaussian_data(name, spec, mean, std):
    """x_t has variance V_t = a_t^2 std^2 + s_t^2, and V_{t-1} beta_t / V_t of V_{t-1} is left when x_t is known."""
    whole = make_schedule(name, 1000)
    # The perfect network says eps = s_t (x_t - a_t mean) / V_t, whose square has the mean s_t^2 / V_t.
    noised = whole.alpha_bar * std**2 + 1 - whole.alpha_bar
    moments = NoiseStatistics(tuple((1 - whole.alpha_bar) / noised), mean**2 + std**2)

    schedule = respace(whole, spec)
    before, after = (a * std**2 + 1 - a for a in (schedule.alpha_bar_prev, schedule.alpha_bar))
    true = before * schedule.betas / after
    np.testing.assert_allclose(variance.analytic(schedule, moments), true, rtol=1e-6, atol=1e-12)


def test_the_analytic_variance_from_samples_is_the_true_one():
    schedule, mean, std, t = respace(COSINE, 50), 0.3, 0.5, 25
    index = jnp.full(512, t, jnp.int32)
    x_0, noise = mean + std * normals((512, 256)), normals((512, 256), seed=1)
    eps = gaussian(schedule, "eps", mean, std)(q_sample(schedule, x_0, index, noise), index)
    measured = np.zeros(1000)
    measured[schedule.timesteps[t]] = np.mean(np.square(eps))
    moments = NoiseStatistics(tuple(measured), float(np.mean(np.square(x_0))))
    before, after = (a[t] * std**2 + 1 - a[t] for a in (schedule.alpha_bar_prev, schedule.alpha_bar))
    np.testing.assert_allclose(variance.analytic(schedule, moments)[t], before * schedule.betas[t] / after, rtol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_estimate_stays_between_certainty_and_the_spread_of_the_data(name):
    schedule, x_0 = make_schedule(name, 1000), 0.8
    certain = variance.analytic(schedule, NoiseStatistics((1.5,) * 1000, x_0))
    np.testing.assert_allclose(certain, schedule.posterior_variance, rtol=1e-12)
    ignorant = variance.analytic(schedule, NoiseStatistics((-1e9,) * 1000, x_0))
    widest = schedule.posterior_variance + schedule.posterior_mean_x_0**2 * x_0
    np.testing.assert_allclose(ignorant, widest, rtol=1e-12)
    for value in (-0.3, 0.0, 0.5, 0.99):
        between = variance.analytic(schedule, NoiseStatistics((value,) * 1000, x_0))
        assert np.all((certain <= between) & (between <= ignorant))


@pytest.mark.parametrize("of_pure_noise", [0.999, 1.0, 1.001])
def test_pure_noise_leaves_all_of_the_spread(of_pure_noise):
    """Nothing is known of x_0 at zero SNR, however the estimate falls out."""
    schedule = respace(with_zero_terminal_snr(COSINE), 10)
    moments = NoiseStatistics((0.5,) * 999 + (of_pure_noise,), 0.8)
    expected = schedule.posterior_variance[-1] + schedule.alpha_bar[-2] * 0.8
    np.testing.assert_allclose(variance.analytic(schedule, moments)[-1], expected, rtol=1e-12)


def test_moments_of_another_schedule_are_rejected():
    with pytest.raises(UserError, check=mentions("noise statistics", 100, "noise_statistics")):
        variance.analytic(COSINE, NoiseStatistics((0.5,) * 100, 1.0))


@pytest.mark.parametrize(("case", "variance_type"), VARIANCES)
def test_log_variances_equal_guided_diffusion(case, variance_type):
    schedule, t = recorded_process(case)
    network = recorded_network_with_variance(variance_type)
    output = network(channels_last("inputs/x_t"), jnp.asarray(schedule.levels.timestep)[t])
    log_variance = variance.log_variance(schedule, variance_type, variance.split(variance_type, output)[1], t, 4)
    expected = channels_last(f"outputs/{case}/eps/{variance_type}/clip1/p_mean_variance/log_variance")
    assert_each_example_close(log_variance, expected, 1e-6)
