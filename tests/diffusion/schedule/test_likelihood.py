"""Each term of the bound is what it says, their sum the entropy where the network is perfect; then parity."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic_denoisers import gaussian, keys, normals
from public_recordings import (
    CASES,
    RECORDED,
    VARIANCES,
    channels_last,
    recorded_network_with_variance,
    recorded_process,
)

from dalle2_jax import rng
from dalle2_jax.diffusion import (
    Denoised,
    bits_per_dim,
    make_schedule,
    q_sample,
    respace,
    to_x0_eps,
    variance,
    vlb_terms,
    with_zero_terminal_snr,
)
from dalle2_jax.diffusion.likelihood import byte_log_likelihood, normal_kl, prior_bits

COSINE = make_schedule("cosine", 1000)
EVERY_BYTE = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32)
STD = 0.3
"""Of the Gaussian images: far inside the 256 levels, and far wider than one."""


@pytest.mark.parametrize(
    ("mean", "log_variance", "other_mean", "other_log_variance"),
    [(0.3, -1.0, -0.2, 0.5), (0.0, 0.7, 0.0, -0.7), (1.0, -4.0, 1.02, -4.5), (2.0, 0.0, 2.0, 0.0)],
)
def test_divergence_of_normals_is_its_integral(mean, log_variance, other_mean, other_log_variance):
    std = math.exp(log_variance / 2)
    x = mean + std * np.linspace(-12, 12, 200_001)

    def log_density(mean, log_variance):
        return -0.5 * (math.log(2 * math.pi) + log_variance + (x - mean) ** 2 / math.exp(log_variance))

    p, q = log_density(mean, log_variance), log_density(other_mean, other_log_variance)
    expected = np.trapezoid(np.exp(p) * (p - q), x)
    divergence = normal_kl(*(jnp.float32(value) for value in (mean, log_variance, other_mean, other_log_variance)))
    np.testing.assert_allclose(divergence, expected, rtol=1e-5, atol=1e-7)


def test_a_small_divergence_keeps_its_digits():
    """Between N(0, 1) and N(1e-4, e^-1e-4) it is 7.5e-9 to first order, less than float32 resolves near 1."""
    divergence = normal_kl(jnp.float32(0), jnp.float32(0), jnp.float32(1e-4), jnp.float32(-1e-4))
    np.testing.assert_allclose(divergence, 0.25e-8 + 0.5e-8, rtol=2e-3)


def cumulative_normal(z):
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in z])


@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.01, 0.5, 1.2])
@pytest.mark.parametrize("std", [1e-3, 0.01, 0.3, 3.0])
def test_likelihoods_of_the_256_bytes_sum_to_one(mean, std):
    at = jnp.full((256,), mean)
    log_likelihood = byte_log_likelihood(EVERY_BYTE, at, jnp.full((256,), math.log(std)))
    np.testing.assert_allclose(np.exp(np.float64(log_likelihood)).sum(), 1, rtol=2e-5)

    edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 127.5 - 1, [np.inf]])
    true = np.diff(cumulative_normal((edges - mean) / std))
    np.testing.assert_allclose(np.exp(log_likelihood), true, atol=4e-4 * 2)


def test_an_impossible_byte_has_a_finite_likelihood():
    log_likelihood = byte_log_likelihood(EVERY_BYTE, jnp.full((256,), 1.0), jnp.full((256,), -7.0))
    np.testing.assert_allclose(log_likelihood.min(), math.log(1e-12), rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_prior_is_the_divergence_of_x_T_from_noise(name):
    schedule, x_0 = make_schedule(name, 1000), jnp.asarray([[0.5, -1.0], [0.0, 0.25]])
    signal, noise = schedule.alpha_bar[-1], 1 - schedule.alpha_bar[-1]
    # KL(N(a x_0, s^2) || N(0, 1)); s^2 - 1 - log s^2 by its series, for digits
    nats = 0.5 * (signal * np.float64(x_0) ** 2 + signal**2 / 2 + signal**3 / 3 + signal**4 / 4)
    assert 0.99 < noise < 1
    np.testing.assert_allclose(prior_bits(schedule, x_0), nats.mean(axis=1) / math.log(2), rtol=1e-5)
    np.testing.assert_array_equal(prior_bits(with_zero_terminal_snr(schedule), x_0), 0)


def noised(schedule, t):
    x_0 = EVERY_BYTE[jnp.asarray(np.random.default_rng(0).integers(0, 256, (len(t), 64)))]
    return x_0, q_sample(schedule, x_0, t, normals(x_0.shape, seed=1))


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_who_knows_x_0_pays_for_the_variance_alone(name):
    """With beta_tilde nothing at all; with beta, (r - 1 - log r) / 2 nats for r = beta_tilde / beta."""
    schedule, t = make_schedule(name, 100), jnp.arange(1, 100, 7)
    x_0, x_t = noised(schedule, t)
    truth = Denoised(x_0, x_t)
    np.testing.assert_allclose(vlb_terms(schedule, "fixed_small", truth, x_0, x_t, t), 0, atol=1e-6)
    ratio = (schedule.posterior_variance / schedule.betas)[np.asarray(t)]
    bits = 0.5 * (ratio - 1 - np.log(ratio)) / math.log(2)
    np.testing.assert_allclose(vlb_terms(schedule, "fixed_large", truth, x_0, x_t, t), bits, rtol=1e-3, atol=1e-6)


def test_who_errs_about_x_0_pays_by_the_change_of_snr():
    """With beta_tilde L_t = (SNR_{t-1} - SNR_t) (x_0 - x_0')^2 / 2 (Kingma et al. 2021, arXiv 2107.00630, eq. 14)."""
    schedule, t = make_schedule("cosine", 100), jnp.arange(2, 100, 7)
    x_0, x_t = noised(schedule, t)
    snr = np.exp(schedule.log_snr)
    nats = 0.5 * (snr[np.asarray(t) - 1] - snr[np.asarray(t)]) * 0.1**2
    terms = vlb_terms(schedule, "fixed_small", Denoised(x_0 + 0.1, x_t), x_0, x_t, t)
    np.testing.assert_allclose(terms, nats / math.log(2), rtol=1e-4)


def gaussian_bytes(count, dim):
    """Bytes of N(0, STD^2), scaled to [-1, 1], and their mean true -log2 likelihood as discrete numbers."""
    levels = np.rint((np.random.default_rng(0).standard_normal((count, dim)) * STD + 1) * 127.5)
    edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 127.5 - 1, [np.inf]])
    mass = np.diff(cumulative_normal(edges / STD))
    clipped = np.clip(levels, 0, 255).astype(int)
    return EVERY_BYTE[jnp.asarray(clipped)], -np.log2(mass[clipped]).mean()


def network_with_best_variance(whole, schedule):
    """The perfect network of N(0, STD^2) and the true variance of p(x_{t-1} | x_t), for "learned"."""
    before, after = (a * STD**2 + 1 - a for a in (schedule.alpha_bar_prev, schedule.alpha_bar))
    best = np.zeros(whole.num_steps, np.float32)
    best[schedule.timesteps] = np.log(before * schedule.betas / after)
    mean = gaussian(whole, "x0", 0.0, STD)

    def denoiser(x_t, t):
        log_variance = jnp.broadcast_to(jnp.asarray(best)[t][:, None], x_t.shape)
        return jnp.concatenate([mean(x_t, t), log_variance], axis=-1)

    return denoiser


@functools.partial(jax.jit, static_argnames=("name", "spec", "variance_type"))
def bound_of_gaussian(name, spec, variance_type, x_0, keys):
    whole = make_schedule(name, 1000)
    schedule = respace(whole, spec)
    learned = variance_type == "learned"
    network = network_with_best_variance(whole, schedule) if learned else gaussian(whole, "x0", 0.0, STD)
    return bits_per_dim(schedule, "x0", variance_type, network, x_0, keys, clip_sample=None)


@pytest.mark.parametrize(("name", "spec"), [("cosine", 10), ("cosine", 50), ("linear", 50)])
def test_the_bound_is_the_entropy_when_the_whole_reverse_process_is_true(name, spec):
    """At any number of steps: with the true mean and variance p is the time reversal of q, and nothing is lost.

    What remains is chance, 0.008 bits in so many images, and the first step, as narrow as one of the 256 levels.
    """
    x_0, entropy = gaussian_bytes(64, 1024)
    assert abs(entropy - (0.5 * math.log2(2 * math.pi * math.e * STD**2) + math.log2(127.5))) < 0.01
    bound = bound_of_gaussian(name, spec, "learned", x_0, keys(64))
    np.testing.assert_allclose(bound["total"].mean(), entropy, atol=0.025)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_a_fixed_variance_loses_bits_and_fewer_in_more_steps(variance_type):
    x_0, entropy = gaussian_bytes(16, 1024)
    few, more = (bound_of_gaussian("cosine", n, variance_type, x_0, keys(16))["total"].mean() for n in (10, 50))
    assert few > entropy + 0.2
    assert entropy < more < entropy + 0.3 * (few - entropy)


def test_the_bound_is_the_sum_of_its_terms():
    x_0, _ = gaussian_bytes(3, 16)
    spec = "t:0,100,300,500"  # ends far from noise, so that L_T counts
    schedule = respace(COSINE, spec)
    bound = bound_of_gaussian("cosine", spec, "learned", x_0, keys(3))
    assert bound["total"].shape == (3,) and all(bound[name].shape == (4, 3) for name in ("vlb", "mse", "x_0_mse"))
    np.testing.assert_allclose(bound["total"], bound["prior"] + bound["vlb"].sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(bound["prior"], prior_bits(schedule, x_0), rtol=1e-6)
    assert np.all(bound["prior"] > 0.01)
    # x_0 and eps of one x_t err alike, but for the ratio of their rates.
    snr = np.broadcast_to(np.exp(schedule.log_snr)[:, None], (4, 3))
    np.testing.assert_allclose(bound["mse"] / bound["x_0_mse"], snr, rtol=1e-3)


def test_a_image_has_the_same_bound_in_any_batch():
    x_0, _ = gaussian_bytes(4, 16)
    whole = bound_of_gaussian("cosine", 10, "learned", x_0, keys(4))["total"]
    halves = slice(0, 2), slice(2, 4)
    apart = [bound_of_gaussian("cosine", 10, "learned", x_0[half], keys(4)[half])["total"] for half in halves]
    np.testing.assert_allclose(whole, np.concatenate(apart), rtol=1e-5)
    assert len(np.unique(whole)) == 4


@pytest.mark.parametrize("case", CASES)
def test_prior_bits_equal_guided_diffusion(case):
    schedule, _ = recorded_process(case)
    bits = prior_bits(schedule, channels_last("inputs/x_start"))
    # The recording itself is off by 1e-4: it subtracts numbers near 1. Ours is compared with theory above.
    np.testing.assert_allclose(bits, RECORDED[f"outputs/{case}/prior_bpd"], rtol=2e-4)


def test_likelihood_of_bytes_equals_guided_diffusion():
    x, mean, log_std = (jnp.asarray(RECORDED[f"inputs/dgll/{name}"]) for name in ("x", "means", "log_scales"))
    likelihood, expected = np.exp(byte_log_likelihood(x, mean, log_std)), np.exp(RECORDED["outputs/dgll/log_probs"])
    # Far out both are differences of numbers near 1.
    np.testing.assert_allclose(likelihood, expected, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("prediction_type", ["eps", "x0"])
@pytest.mark.parametrize(("case", "variance_type"), VARIANCES)
@pytest.mark.numerics
def test_terms_of_the_bound_equal_guided_diffusion(case, variance_type, prediction_type):
    schedule, t = recorded_process(case)
    x_0, network = channels_last("inputs/x_start"), recorded_network_with_variance(variance_type)
    x_t = q_sample(schedule, x_0, t, channels_last("inputs/noise"))
    prediction, raw = variance.split(variance_type, network(x_t, jnp.asarray(schedule.levels.timestep)[t]))
    pair = to_x0_eps(schedule, prediction_type, prediction, x_t, t)._replace(variance=raw)
    for clip, predicted in enumerate([pair.x_0, jnp.clip(pair.x_0, -1, 1)]):
        bits = vlb_terms(schedule, variance_type, pair._replace(x_0=predicted), x_0, x_t, t)
        expected = RECORDED[f"outputs/{case}/{prediction_type}/{variance_type}/clip{clip}/vb_terms_bpd"]
        # The public code subtracts log-variances from -1, which leaves 3e-7 bits of float32's rounding.
        np.testing.assert_allclose(bits, expected, rtol=1e-5, atol=3e-7)


def test_the_whole_bound_equals_guided_diffusion(monkeypatch):
    noise = channels_last("inputs/bpd_loop/noise")[::-1]  # recorded from the noisiest step on
    monkeypatch.setattr(rng, "at_step", lambda key, step: step)
    monkeypatch.setattr(rng, "normal", lambda steps, shape: noise[steps[0]])
    schedule = respace(COSINE, "10,10,10")
    network, x_0 = recorded_network_with_variance("learned_range"), channels_last("inputs/x_start")
    bound = bits_per_dim(schedule, "eps", "learned_range", network, x_0, keys(5))
    np.testing.assert_allclose(bound["total"], RECORDED["outputs/bpd_loop/total_bpd"], rtol=1e-5)
    np.testing.assert_allclose(bound["prior"], RECORDED["outputs/bpd_loop/prior_bpd"], rtol=2e-4)
    for ours, theirs, rounding in [("vlb", "vb", 3e-7), ("mse", "mse", 1e-11), ("x_0_mse", "xstart_mse", 0)]:
        expected = RECORDED[f"outputs/bpd_loop/{theirs}"].T[::-1]
        np.testing.assert_allclose(bound[ours], expected, rtol=1e-5, atol=rounding)
