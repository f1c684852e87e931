"""Respacing by its grammar: which steps are chosen, near which ideal, and the errors for impossible specifications."""

import numpy as np
import pytest
from public_recordings import RECORDED
from raised import mentions

from dalle2_jax.diffusion import make_schedule, respace, shifted, with_zero_terminal_snr
from dalle2_jax.errors import UserError

COSINE, LINEAR = make_schedule("cosine", 1000), make_schedule("linear", 1000)
SCHEDULES = {
    "linear": LINEAR,
    "scaled_linear": make_schedule("scaled_linear", 1000),
    "cosine": COSINE,
    "sigmoid": make_schedule("sigmoid", 1000),
    "cosine_to_pure_noise": with_zero_terminal_snr(COSINE),
    "linear_shifted": shifted(LINEAR, 0.25),
    "cosine_100": respace(COSINE, 100),
}
SPACINGS = ["logsnr", "karras", "karras:1", "karras:3.5"]


def spec_of(spacing, count):
    name, _, rho = spacing.partition(":")
    return f"{name}{count}" + (f":{rho}" if rho else "")


def ideal_log_snr(schedule, spacing, count):
    """The levels of the papers as log SNR, cleanest first; sigma = noise rate / signal rate goes to 80 at most."""
    sigma = np.exp(-schedule.log_snr / 2)
    least, most = sigma[0], min(sigma[-1], 80.0)
    share = np.arange(count) / (count - 1)
    if spacing == "logsnr":
        return -2 * np.log(least * (most / least) ** share)
    rho = float(spacing.partition(":")[2] or 7)
    return -2 * np.log((least ** (1 / rho) + share * (most ** (1 / rho) - least ** (1 / rho))) ** rho)


def kept(schedule, spec):
    """Indices into the schedule of the timesteps that a respacing keeps."""
    return np.searchsorted(schedule.timesteps, respace(schedule, spec).timesteps)


@pytest.mark.parametrize("spec", ["fast27", "100", "27", "ddim100"])
def test_timesteps_equal_glide(spec):
    np.testing.assert_array_equal(respace(LINEAR, spec).timesteps, RECORDED[f"glide/space/{spec}"])


def test_timesteps_equal_karlo():
    np.testing.assert_array_equal(respace(COSINE, 7).timesteps, [0, 166, 333, 500, 666, 832, 999])


@pytest.mark.parametrize("spec", [10, "10,10,10", "ddim50", "fast27", "logsnr20", "karras20", "t:0,3,500,999"])
@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_to_pure_noise"])
def test_respacing_keeps_alpha_bar(name, spec):
    schedule = SCHEDULES[name]
    part = respace(schedule, spec)
    np.testing.assert_allclose(part.alpha_bar, schedule.alpha_bar[part.timesteps], rtol=1e-8)
    np.testing.assert_allclose(1 - part.betas, part.alpha_bar / part.alpha_bar_prev, rtol=1e-8)


def test_respacing_composes():
    twice = respace(respace(COSINE, "100"), 10)
    np.testing.assert_allclose(twice.alpha_bar, COSINE.alpha_bar[twice.timesteps], rtol=1e-8)
    assert twice.timesteps[0] == 0 and twice.timesteps[-1] == 999


def test_a_number_of_steps_is_evenly_spaced_from_end_to_end():
    np.testing.assert_array_equal(respace(COSINE, "4").timesteps, [0, 333, 666, 999])


def test_sections_divide_what_is_left_over_among_the_first():
    """1000 steps in three sections are 334, 333 and 333."""
    np.testing.assert_array_equal(respace(COSINE, "2,3,1").timesteps, [0, 333, 334, 500, 666, 667])


def test_ddim_strides_from_the_first_step():
    np.testing.assert_array_equal(respace(COSINE, "ddim4").timesteps, [0, 250, 500, 750])


def test_listed_timesteps_are_taken_as_they_are():
    assert respace(COSINE, "t:3, 250,998").timesteps.tolist() == [3, 250, 998]
    every_tenth = respace(COSINE, "ddim100")
    assert respace(every_tenth, "t:0,250,990").timesteps.tolist() == [0, 250, 990]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_are_as_many_as_asked_each_different_from_clean_to_sigma_80(name, spacing):
    schedule = SCHEDULES[name]
    noisiest = np.abs(schedule.log_snr - max(schedule.log_snr[-1], -2 * np.log(80))).argmin()
    for count in (2, 3, 5, 20, 90):
        steps = kept(schedule, spec_of(spacing, count))
        assert len(steps) == count and steps[0] == 0
        assert np.all(np.diff(steps) > 0)
        # A crowd of levels may push the last one beyond sigma = 80, never short of it.
        assert steps[-1] == noisiest if count <= 3 else noisiest <= steps[-1] < schedule.num_steps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_are_the_nearest_timesteps_to_the_ideal(name, spacing):
    """Where several would take one timestep, none moves further than the number that had to give way."""
    schedule = SCHEDULES[name]
    for count in (2, 5, 20, 90):
        wanted = ideal_log_snr(schedule, spacing, count)
        nearest = np.array([np.abs(schedule.log_snr - level).argmin() for level in wanted])
        gave_way = count - len(np.unique(nearest))
        assert np.abs(kept(schedule, spec_of(spacing, count)) - nearest).max() <= gave_way


@pytest.mark.parametrize(("spacing", "count"), [("logsnr", 20), ("karras", 20), ("karras:3.5", 10)])
def test_levels_are_close_to_the_ideal(spacing, count):
    """Within half a step of the 1000, which is widest, 0.8 in log SNR, at the clean end."""
    for schedule in (LINEAR, COSINE):
        error = schedule.log_snr[kept(schedule, spec_of(spacing, count))] - ideal_log_snr(schedule, spacing, count)
        assert np.abs(error).max() < 0.4
        assert np.abs(error[count // 2 :]).max() < 0.1


def test_karras_approaches_even_log_snr_as_rho_grows():
    distance = np.abs(respace(LINEAR, "karras20:10000").timesteps - respace(LINEAR, "logsnr20").timesteps)
    assert distance.max() <= 1


@pytest.mark.parametrize("rho", ["0.1", "0.001"])
def test_karras_crowds_at_the_noisy_end_as_rho_falls(rho):
    first, *rest = respace(LINEAR, f"karras5:{rho}").timesteps
    assert first == 0 and np.all(np.diff(rest) > 0)
    np.testing.assert_allclose(-LINEAR.log_snr[rest] / 2, np.log(80), atol=0.2)


def test_the_usual_rho_is_7():
    np.testing.assert_array_equal(respace(LINEAR, "karras20").timesteps, respace(LINEAR, "karras20:7").timesteps)


@pytest.mark.parametrize("spacing", ["", "logsnr", "karras"])
def test_as_many_steps_as_there_are_is_the_schedule_itself(spacing):
    assert respace(COSINE, f"{spacing}1000") is COSINE
    assert respace(COSINE, f"{spacing}999").num_steps == 999


def test_one_step_starts_from_noise():
    assert respace(COSINE, 1).timesteps.tolist() == [999]
    for spec in ("logsnr1", "karras1"):
        np.testing.assert_allclose(respace(COSINE, spec).log_snr, -2 * np.log(80), atol=0.2)


def test_same_arguments_give_the_same_object():
    assert respace(COSINE, 10) is respace(COSINE, "10")
    assert respace(COSINE, "10, 10") is respace(COSINE, "10,10")
    assert hash(respace(COSINE, 10)) == hash(respace(COSINE, 10))
    assert respace(COSINE, 10) is not respace(LINEAR, 10)


EXAMPLES = (50, "'ddim50'")
"""Of respacings, in the error of one that cannot be read."""


@pytest.mark.parametrize(
    ("spec", "facts"),
    [
        (2000, [2000, "at most 1000"]),
        ("10,10,3,2,300", [300, "at most 200"]),
        ("logsnr1001", [1001, "at most 1000"]),
        ("karras1001:3", [1001, "at most 1000"]),
        ("ddim300", ["'ddim300'", 1000, "'ddim334'"]),
        ("ddim0", ["'ddim0'", 1000, "'ddim1'"]),
        ("karras20:0", ["rho", "above 0", 0.0]),
        ("t:0,500,250", ["ascend", "0,500,250"]),
        ("t:0,250,250", ["ascend", "0,250,250"]),
        ("20/3", [3, 20, "1, 2, 4, 5, 10"]),
        ("20/0", ["'20/0'"]),
        ("x/2", ["'x'"]),
        ("t:0,1000", ["timestep 1000", 999]),
        *((spec, [f"'{spec}'", *EXAMPLES]) for spec in (0, -3, 2.5, "", "fast", "fast28", "ddim", "10,,2", "10,")),
        *((spec, [f"'{spec}'", *EXAMPLES]) for spec in ("logsnr", "logsnr0", "karras0", "karras")),
        *((spec, EXAMPLES) for spec in ("9" * 5000, f"t:{'9' * 5000}", f"ddim{'9' * 5000}")),
        *((f"karras20:{rho}", ["rho", "at most 1000000", float(rho)]) for rho in (0, 9999999)),
        (",".join(["1"] * 5000), [5000, "at most 1000"]),
        *((spec, [f"'{spec}'", *EXAMPLES]) for spec in ("karras20:", "karras20:-1", "t:", "t:0,", "t:-1,5", "t:1.5")),
    ],
)
def test_impossible_respacings_say_what_to_do(spec, facts):
    with pytest.raises(UserError, check=mentions(*facts)):
        respace(COSINE, spec)


def test_a_timestep_that_was_left_out_is_not_there():
    with pytest.raises(UserError, check=mentions("timestep 5", 990)):
        respace(respace(COSINE, "ddim100"), "t:0,5")


@pytest.mark.parametrize(
    ("spec", "whole", "indices"),
    [("20/4", "20", [4, 9, 14, 19]), ("logsnr12/3", "logsnr12", [3, 7, 11]), ("16/4/2", "16", [7, 15])],
)
def test_a_share_of_steps_ends_with_the_last(spec, whole, indices):
    schedule = make_schedule("cosine", 1000)
    assert respace(schedule, spec).timesteps.tolist() == respace(schedule, whole).timesteps[indices].tolist()
