"""Schedules by their definitions, respacing by its grammar, and both against public tables."""

import numpy as np
import pytest
from public_recordings import RECORDED

from dalle2_jax.diffusion import make_schedule, respace
from dalle2_jax.types import UserError

RESPACINGS = {"none": 1000, "25": "25", "ddim50": "ddim50", "10_10_10": "10,10,10"}


@pytest.mark.parametrize("respacing", RESPACINGS)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_tables_equal_guided_diffusion(name, respacing):
    schedule = respace(make_schedule(name, 1000), RESPACINGS[respacing])
    tables = {
        "betas": schedule.betas,
        "alphas_cumprod": schedule.alpha_bar,
        "posterior_variance": schedule.posterior_variance,
        "posterior_log_variance_clipped": schedule.posterior_log_variance,
        "posterior_mean_coef1": schedule.posterior_mean_x_0,
        "posterior_mean_coef2": schedule.posterior_mean_x_t,
        "timestep_map": schedule.timesteps,
    }
    for table, value in tables.items():
        np.testing.assert_allclose(value, RECORDED[f"tables/{name}/{respacing}/{table}"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("spec", ["fast27", "100", "27", "ddim100"])
def test_timesteps_equal_glide(spec):
    np.testing.assert_array_equal(
        respace(make_schedule("linear", 1000), spec).timesteps, RECORDED[f"glide/space/{spec}"]
    )


def test_timesteps_equal_karlo():
    np.testing.assert_array_equal(
        respace(make_schedule("cosine", 1000), 7).timesteps, [0, 166, 333, 500, 666, 832, 999]
    )


@pytest.mark.parametrize("num_steps", [1, 2, 25, 1000])
def test_cosine_follows_its_formula(num_steps):
    u = np.arange(1, num_steps + 1) / num_steps
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    schedule = make_schedule("cosine", num_steps)
    np.testing.assert_allclose(schedule.alpha_bar[:-1], f[:-1], rtol=1e-9)
    assert schedule.betas[-1] == 0.999


@pytest.mark.parametrize("num_steps", [21, 1000, 4000])
def test_linear_ends_alike_at_any_length(num_steps):
    schedule = make_schedule("linear", num_steps)
    assert np.all(np.diff(schedule.alpha_bar) < 0) and 0 < schedule.alpha_bar[-1] < 5e-5


def test_respacing_keeps_alpha_bar_and_composes():
    schedule = make_schedule("cosine", 1000)
    once = respace(schedule, "100")
    np.testing.assert_allclose(once.alpha_bar, schedule.alpha_bar[once.timesteps], rtol=1e-8)
    twice = respace(once, 10)
    np.testing.assert_allclose(twice.alpha_bar, schedule.alpha_bar[twice.timesteps], rtol=1e-8)
    assert twice.timesteps[0] == 0 and twice.timesteps[-1] == 999


def test_one_step_starts_from_noise():
    assert respace(make_schedule("cosine", 1000), 1).timesteps.tolist() == [999]


def test_posterior_log_variance_is_finite_for_a_single_step():
    assert np.isfinite(respace(make_schedule("cosine", 1000), 1).posterior_log_variance).all()


def test_same_arguments_give_the_same_object():
    schedule = make_schedule("cosine", 100)
    assert make_schedule("cosine", 100) is schedule
    assert respace(schedule, 10) is respace(schedule, "10")
    assert respace(schedule, 100) is schedule
    assert hash(respace(schedule, 10)) == hash(respace(schedule, 10))


def test_tables_cannot_be_changed_by_a_borrower():
    schedule = make_schedule("cosine", 10)
    for table in (schedule.betas, schedule.alpha_bar, schedule.timesteps):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (2000, "at most 1000"),
        ("10,10,3,2,300", "at most 200"),
        ("ddim300", "'ddim300' does not divide 1000 steps; the nearest that does is 'ddim334'"),
        ("ddim", "not a respacing"),
        ("fast", "not a respacing"),
        ("10,,2", "not a respacing"),
        (0, "not a respacing"),
        (-3, "not a respacing"),
    ],
)
def test_impossible_respacings_say_what_to_do(spec, says):
    with pytest.raises(UserError, match=says) as error:
        respace(make_schedule("cosine", 1000), spec)
    assert "\n" not in str(error.value)


def test_unknown_schedule_offers_the_nearest():
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        make_schedule("cosin", 1000)


@pytest.mark.parametrize(("name", "num_steps"), [("linear", 20), ("cosine", 0)])
def test_schedule_too_short(name, num_steps):
    with pytest.raises(UserError, match=str(num_steps)):
        make_schedule(name, num_steps)
