"""Schedules by their definitions, and against public tables."""

import pathlib

import numpy as np
import pytest
from public_recordings import RECORDED
from raised import mentions

from dalle2_jax.diffusion import (
    in_float32,
    make_schedule,
    of_alpha_bar,
    respace,
    shifted,
    with_zero_terminal_snr,
)
from dalle2_jax.errors import UserError

NAMES = ["linear", "scaled_linear", "cosine", "sigmoid"]
SCHEDULES = {name: make_schedule(name, 1000) for name in NAMES}
RESPACINGS = {"none": 1000, "25": "25", "ddim50": "ddim50", "10_10_10": "10,10,10"}


@pytest.mark.parametrize("respacing", RESPACINGS)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_tables_equal_guided_diffusion(name, respacing):
    schedule = respace(make_schedule(name, 1000), RESPACINGS[respacing])
    tables = {
        "betas": schedule.betas,
        "alphas_cumprod": schedule.alpha_bar,
        "alphas_cumprod_prev": schedule.alpha_bar_prev,
        "sqrt_alphas_cumprod": schedule.signal_rate,
        "sqrt_one_minus_alphas_cumprod": schedule.noise_rate,
        "posterior_variance": schedule.posterior_variance,
        "posterior_log_variance_clipped": schedule.posterior_log_variance,
        "posterior_mean_coef1": schedule.posterior_mean_x_0,
        "posterior_mean_coef2": schedule.posterior_mean_x_t,
        "timestep_map": schedule.timesteps,
    }
    for table, value in tables.items():
        np.testing.assert_allclose(value, RECORDED[f"tables/{name}/{respacing}/{table}"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_steps", [21, 250, 1000, 4000])
def test_linear_follows_its_formula(num_steps):
    schedule = make_schedule("linear", num_steps)
    betas = [1000 / num_steps * (1e-4 + (0.02 - 1e-4) * i / (num_steps - 1)) for i in range(num_steps)]
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-12)
    assert 0 < schedule.alpha_bar[-1] < 5e-5  # noise enough at any length


@pytest.mark.parametrize("num_steps", [25, 1000, 4000])
def test_scaled_linear_follows_its_formula(num_steps):
    schedule = make_schedule("scaled_linear", num_steps)
    first, last = 0.00085**0.5, 0.012**0.5
    betas = [1000 / num_steps * (first + (last - first) * i / (num_steps - 1)) ** 2 for i in range(num_steps)]
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 25, 1000])
def test_cosine_follows_its_formula(num_steps):
    u = np.arange(1, num_steps + 1) / num_steps
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    schedule = make_schedule("cosine", num_steps)
    np.testing.assert_allclose(schedule.alpha_bar[:-1], f[:-1], rtol=1e-9)
    assert schedule.betas[-1] == 0.999


@pytest.mark.parametrize("num_steps", [1, 2, 25, 1000])
def test_sigmoid_follows_its_formula(num_steps):
    """With S(z) = (1 + tanh(z / 2)) / 2 it is a tanh, symmetric about the middle."""
    u = np.arange(1, num_steps + 1) / num_steps
    alpha_bar = 0.5 - np.tanh(3 * u - 1.5) / (2 * np.tanh(1.5))
    schedule = make_schedule("sigmoid", num_steps)
    np.testing.assert_allclose(schedule.alpha_bar[:-1], alpha_bar[:-1], rtol=1e-9)
    assert schedule.betas[-1] == 0.999


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_adds_noise_at_every_step(name):
    schedule = make_schedule(name, 1000)
    assert schedule.num_steps == 1000 and schedule.betas.dtype == np.float64
    assert np.all((schedule.betas > 0) & (schedule.betas < 1))
    np.testing.assert_array_equal(schedule.timesteps, np.arange(1000))
    np.testing.assert_allclose(np.exp(schedule.log_snr), schedule.alpha_bar / (1 - schedule.alpha_bar), rtol=1e-12)
    np.testing.assert_allclose(schedule.signal_rate**2 + schedule.noise_rate**2, 1, rtol=1e-14)


@pytest.mark.parametrize("spec", [1000, 25, "ddim50"])
@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr_follows_the_paper(name, spec):
    """Lin et al., algorithm 1, line by line."""
    schedule = respace(make_schedule(name, 1000), spec)
    root = np.sqrt(np.cumprod(1 - schedule.betas))
    first, last = root[0].copy(), root[-1].copy()
    root -= last
    root *= first / (first - last)
    alphas = np.concatenate([root[:1] ** 2, root[1:] ** 2 / root[:-1] ** 2])

    stretched = with_zero_terminal_snr(schedule)
    np.testing.assert_allclose(stretched.betas, 1 - alphas, rtol=1e-9)
    np.testing.assert_array_equal(stretched.timesteps, schedule.timesteps)


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr_ends_in_pure_noise_and_starts_as_before(name):
    schedule = make_schedule(name, 1000)
    stretched = with_zero_terminal_snr(schedule)
    assert stretched.alpha_bar[-1] == 0 and stretched.betas[-1] == 1 and stretched.log_snr[-1] == -np.inf
    assert stretched.levels.signal_rate[-1] == 0 and stretched.levels.noise_rate[-1] == 1
    np.testing.assert_allclose(stretched.alpha_bar[0], schedule.alpha_bar[0], rtol=1e-12)
    assert np.all(np.diff(stretched.alpha_bar) < 0)
    # The last step back sees nothing of x_0 in x_T: it samples from q(x_{T-1} | x_0).
    assert stretched.posterior_mean_x_t[-1] == 0
    np.testing.assert_allclose(stretched.posterior_mean_x_0[-1], stretched.signal_rate[-2], rtol=1e-12)
    np.testing.assert_allclose(stretched.posterior_variance[-1], 1 - stretched.alpha_bar[-2], rtol=1e-12)


@pytest.mark.parametrize("ratio", [0.25, 2, 4.0, 64 / 24])
@pytest.mark.parametrize("name", NAMES)
def test_a_shift_moves_log_snr_by_the_ratio_of_sides(name, ratio):
    schedule = make_schedule(name, 1000)
    moved = shifted(schedule, ratio)
    np.testing.assert_allclose(moved.log_snr - schedule.log_snr, -2 * np.log(ratio), rtol=1e-6)
    np.testing.assert_array_equal(moved.timesteps, schedule.timesteps)


def test_a_shift_and_its_inverse_change_nothing():
    schedule = make_schedule("cosine", 1000)
    np.testing.assert_allclose(shifted(shifted(schedule, 4), 0.25).betas, schedule.betas, rtol=1e-9)


def test_noise_as_averaging_pixels_sees_it_is_kept_by_a_shift():
    """Averaging r x r pixels of equal signal divides the noise's variance by r^2 (Hoogeboom et al., section 3.1)."""
    schedule, r = make_schedule("cosine", 1000), 4
    fine = shifted(schedule, r)
    after_averaging = fine.alpha_bar / ((1 - fine.alpha_bar) / r**2)
    np.testing.assert_allclose(after_averaging, np.exp(schedule.log_snr), rtol=1e-6)


def test_pure_noise_stays_pure_noise_when_shifted():
    stretched = with_zero_terminal_snr(make_schedule("linear", 1000))
    assert shifted(stretched, 4).alpha_bar[-1] == 0 and shifted(stretched, 0.25).alpha_bar[-1] == 0


def test_posterior_log_variance_is_finite_for_a_single_step():
    schedule = respace(make_schedule("cosine", 1000), 1)
    np.testing.assert_array_equal(schedule.posterior_log_variance, np.log(schedule.betas))


def test_same_arguments_give_the_same_object():
    schedule = make_schedule("cosine", 100)
    assert make_schedule("cosine", 100) is schedule
    assert with_zero_terminal_snr(schedule) is with_zero_terminal_snr(schedule) is not schedule
    assert shifted(schedule, 4) is shifted(schedule, 4) is not shifted(schedule, 2)


def test_tables_cannot_be_changed_by_a_borrower():
    schedule = make_schedule("cosine", 10)
    for table in (schedule.betas, schedule.alpha_bar, schedule.timesteps):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0


def test_unknown_schedule_offers_the_nearest():
    with pytest.raises(UserError, check=mentions("'cosin'", "'cosine'")):
        make_schedule("cosin", 1000)


@pytest.mark.parametrize(("name", "num_steps"), [("linear", 20), ("cosine", 0), ("sigmoid", 0)])
def test_schedule_too_short(name, num_steps):
    with pytest.raises(UserError, check=mentions("schedule", num_steps)):
        make_schedule(name, num_steps)


@pytest.mark.parametrize("ratio", [0, -2.0, float("nan"), float("inf")])
def test_a_shift_needs_a_ratio(ratio):
    with pytest.raises(UserError, check=mentions("resolution_shift", ratio)):
        shifted(make_schedule("cosine", 10), ratio)


def test_one_step_cannot_end_in_pure_noise():
    with pytest.raises(UserError, check=mentions("one step", "pure noise")):
        with_zero_terminal_snr(make_schedule("cosine", 1))


TABLES = ("alpha_bar_prev", "signal_rate", "noise_rate", "posterior_mean_x_0", "posterior_mean_x_t")
TABLES += ("posterior_variance", "posterior_log_variance", "log_snr")


def test_float32_tables_are_those_of_diffusers():
    """Recorded from its UnCLIPScheduler: betas and alphas_cumprod to the last bit."""
    folder = pathlib.Path(__file__).parents[2] / "fixtures" / "karlo_tiny"
    schedule = in_float32(make_schedule("cosine", 1000))
    with np.load(folder / "parity.npz") as recorded:
        np.testing.assert_array_equal(schedule.betas, recorded["prior_scheduler/betas"])
        np.testing.assert_array_equal(schedule.alpha_bar, recorded["prior_scheduler/alphas_cumprod"])


@pytest.mark.parametrize("spec", [1000, 25, "t:0,1,2,500,999"])
@pytest.mark.parametrize("name", NAMES)
def test_float32_tables_are_float32_throughout_and_close_to_the_exact_ones(name, spec):
    exact, rounded = (respace(schedule, spec) for schedule in (SCHEDULES[name], in_float32(SCHEDULES[name])))
    assert rounded.alpha_bar.dtype == rounded.betas.dtype == np.float32
    np.testing.assert_allclose(rounded.alpha_bar, exact.alpha_bar, rtol=2e-4)
    for table in TABLES:
        ours, theirs = getattr(rounded, table), getattr(exact, table)
        assert ours.dtype == np.float32 and theirs.dtype == np.float64, table
        np.testing.assert_allclose(ours, theirs, rtol=2e-2, atol=2e-3, err_msg=table)


def test_of_float32_tables_a_beta_that_is_kept_is_not_computed_anew():
    schedule = in_float32(SCHEDULES["cosine"])
    kept = respace(schedule, "t:0,1,2,500,999")
    np.testing.assert_array_equal(kept.betas[:3], schedule.betas[:3])
    np.testing.assert_array_equal(kept.alpha_bar, schedule.alpha_bar[[0, 1, 2, 500, 999]])
    assert kept.betas[3] == 1 - kept.alpha_bar[3] / kept.alpha_bar[2]


def test_a_schedule_whose_first_step_is_lost_in_float32_is_rejected():
    with pytest.raises(UserError, check=mentions("2 steps", "float32", "first beta")):
        in_float32(of_alpha_bar(np.array([1 - 1e-9, 0.5])))


def test_a_schedule_of_any_alpha_bar():
    """As from another implementation; its dtype is that of the arithmetic."""
    exact = SCHEDULES["linear"]
    made = of_alpha_bar(exact.alpha_bar)
    np.testing.assert_allclose(made.betas, exact.betas, rtol=1e-9)
    np.testing.assert_array_equal(made.timesteps, exact.timesteps)
    np.testing.assert_array_equal(of_alpha_bar(exact.alpha_bar[:3], np.array([2, 5, 9])).timesteps, [2, 5, 9])
    rounded = of_alpha_bar(exact.alpha_bar.astype(np.float32))
    assert rounded.posterior_variance.dtype == np.float32
    np.testing.assert_array_equal(rounded.alpha_bar, exact.alpha_bar.astype(np.float32))


@pytest.mark.parametrize(
    ("alpha_bar", "timesteps", "facts"),
    [
        ([0.5, 0.5], None, ["alpha_bar", "descend"]),
        ([1.0, 0.5], None, ["alpha_bar", "descend"]),
        ([0.5, -0.1], None, ["alpha_bar", "descend"]),
        ([0.5, float("nan")], None, ["alpha_bar", "descend"]),
        ([], None, ["alpha_bar", "descend"]),
        ([[0.5, 0.4]], None, ["alpha_bar", "descend"]),
        ([0.5, 0.4], [1, 1], ["timesteps", "2 ascending numbers"]),
        ([0.5, 0.4], [-1, 1], ["timesteps", "2 ascending numbers"]),
        ([0.5, 0.4], [1], ["timesteps", "2 ascending numbers"]),
    ],
)
def test_no_alpha_bar(alpha_bar, timesteps, facts):
    with pytest.raises(UserError, check=mentions(*facts)):
        of_alpha_bar(np.array(alpha_bar), None if timesteps is None else np.array(timesteps))
