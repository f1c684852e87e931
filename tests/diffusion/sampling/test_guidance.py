"""Guidance against its formula, written out with a call for each branch; and no branch computed for nothing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic_denoisers import gaussian, normals
from raised import mentions

from dalle2_jax.diffusion import GuidanceSchedule, branches, guided, make_schedule, to_x0_eps
from dalle2_jax.errors import UserError

NUM_STEPS = 50
SCHEDULE = make_schedule("cosine", NUM_STEPS)
T = jnp.array([3, 10, 25, 40], jnp.int32)
U = np.asarray(T) / (NUM_STEPS - 1)
X_T = normals((4, 6))
LAWS = ((-0.5, 1.0), (0.3, 0.7), (1.0, 0.5))
"""Mean and standard deviation of the data of branch 0 (unconditional), 1 (image) and 2 (image and caption)."""

SCALES = (0.0, 1.0, 2.5, 4.0, -1.0)


def branch(k, prediction_type="eps"):
    """f_k of the network, alone."""
    return gaussian(SCHEDULE, prediction_type, *LAWS[k])


def learning(k):
    """f_k of a network that predicts a variance too, another one in each branch."""
    return lambda x_t, t: jnp.concatenate([branch(k)(x_t, t), (k + 1.0) * jnp.ones_like(x_t)], axis=-1)


def stacked(computed, one=branch, seen=None):
    """The branches in one call; ``seen`` gets the rows of each."""

    def denoiser(x_t, t):
        if seen is not None:
            seen.append(x_t.shape[0])
        parts = zip(computed, jnp.split(x_t, len(computed)), jnp.split(t, len(computed)), strict=True)
        return jnp.concatenate([one(k)(x, times) for k, x, times in parts])

    return denoiser


def guide(scales, guidance_schedule=GuidanceSchedule(), one=branch, t=T, **kwargs):
    """Returns the guided prediction at X_T, from the branches that the scales need."""
    computed = branches(scales, guidance_schedule)
    return np.asarray(guided(stacked(computed, one), scales, computed, NUM_STEPS, guidance_schedule, **kwargs)(X_T, t))


def close(left, right, atol=1e-5):
    np.testing.assert_allclose(left, right, atol=atol)


@pytest.fixture(scope="module")
def alone():
    """f_0, f_1, f_2 of X_T, each from a call of its own."""
    return [np.asarray(branch(k)(X_T, T), np.float64) for k in range(3)]


@pytest.mark.parametrize("scale", SCALES)
def test_one_scale_is_classifier_free_guidance(scale, alone):
    close(guide([scale], one=lambda k: branch(2 * k)), alone[0] + scale * (alone[2] - alone[0]))


@pytest.mark.parametrize(("image", "text"), list(itertools.product(SCALES, SCALES)))
def test_scales_apart_are_the_sum_over_the_parts(image, text, alone):
    """Equation 2; and the network sees as many rows as there are branches with a weight."""
    seen = []
    computed = branches([image, text])
    value = guided(stacked(computed, seen=seen), [image, text], computed, NUM_STEPS)(X_T, T)
    close(value, alone[0] + image * (alone[1] - alone[0]) + text * (alone[2] - alone[1]))
    weights = (1 - image, image - text, text)
    assert computed == tuple(k for k, weight in enumerate(weights) if weight)
    assert seen == [len(X_T) * len(computed)]


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_equal_scales_are_plain_guidance_and_ask_two_branches(scale, alone):
    assert branches([scale, scale]) == (0, 2)
    close(guide([scale, scale]), alone[0] + scale * (alone[2] - alone[0]))


def test_a_single_branch_is_the_network_itself(alone):
    assert [branches(scales) for scales in ([], [0.0, 0.0], [1.0, 0.0], [1.0, 1.0])] == [(0,), (0,), (1,), (2,)]
    for k, scales in enumerate(([0.0, 0.0], [1.0, 0.0], [1.0, 1.0])):
        close(guide(scales), alone[k], atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["x0", "v"])
def test_guiding_any_prediction_is_guiding_eps(prediction_type):
    mixed = guide([3.0, 1.5], one=lambda k: branch(k, prediction_type), t=T[1:2].repeat(4))
    eps = to_x0_eps(SCHEDULE, prediction_type, jnp.asarray(mixed), X_T, T[1:2].repeat(4)).eps
    close(eps, guide([3.0, 1.5], t=T[1:2].repeat(4)), atol=1e-4)


@pytest.mark.parametrize(
    "scales", [(3.0, 3.0), (4.0, 1.5), (3.0, 0.0), (0.0, 0.0)], ids=lambda scales: "{}_{}".format(*scales)
)
@pytest.mark.parametrize(
    "guidance_schedule", [GuidanceSchedule(), GuidanceSchedule(rescale=0.7)], ids=["plain", "rescaled"]
)
def test_a_learned_variance_is_the_last_branch_s_and_unguided(scales, guidance_schedule):
    value = guide(scales, guidance_schedule, learning, learned_variance=True)
    assert value.shape == (4, 12)
    mean, raw = np.split(value, 2, axis=-1)
    close(mean, guide(scales, guidance_schedule))
    np.testing.assert_array_equal(raw, branches(scales)[-1] + 1.0)


def test_a_network_in_bfloat16_is_guided_in_float32():
    def half(k):
        return lambda x_t, t: branch(k)(x_t, t).astype(jnp.bfloat16)

    value, parts = guide([4.0, 2.0], one=half), [np.asarray(half(k)(X_T, T), np.float32) for k in range(3)]
    assert value.dtype == np.float32
    close(value, -3 * parts[0] + 2 * parts[1] + 2 * parts[2], atol=1e-6)


# --- schedules of the scale -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_a_schedule_keeps_the_mean_scale(kind, scale):
    guidance_schedule, u = GuidanceSchedule(kind), jnp.arange(NUM_STEPS) / (NUM_STEPS - 1)
    over_time = np.asarray(guidance_schedule.at(scale, u.astype(jnp.float32)))
    close(over_time.mean(), scale)
    assert (np.ptp(over_time) > 0.1) == (kind != "constant" and scale != 1.0)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("constant", lambda u: 1 + 0 * u), ("linear", lambda u: 2 - 2 * u), ("cosine", lambda u: 1 + np.cos(np.pi * u))],
)
def test_every_scale_follows_its_schedule_over_the_training_steps(kind, shape, alone):
    """Most guidance at the clean end, none at pure noise."""
    image, text = (1 + (scale - 1) * shape(U)[:, None] for scale in (4.0, 2.0))
    expected = alone[0] + image * (alone[1] - alone[0]) + text * (alone[2] - alone[1])
    close(guide([4.0, 2.0], GuidanceSchedule(kind)), expected)


def test_outside_its_interval_there_is_no_guidance(alone):
    """Of the four examples, each with a step of its own, two are inside."""
    plain, value = guide([4.0, 2.0]), guide([4.0, 2.0], GuidanceSchedule(interval=(0.2, 0.6)))
    assert U[0] < 0.2 < U[1] < U[2] < 0.6 < U[3]
    close(value[1:3], plain[1:3])
    close(value[[0, 3]], alone[2][[0, 3]])
    assert np.abs(plain - alone[2])[[0, 3]].max(axis=1).min() > 0.1


@pytest.mark.parametrize(
    "guidance_schedule", [GuidanceSchedule("linear"), GuidanceSchedule(interval=(0.2, 0.8))], ids=["linear", "interval"]
)
def test_scales_that_change_keep_the_branches_they_need_at_any_step(guidance_schedule):
    """Where there is no guidance the whole condition speaks, also of a scale that is 0 elsewhere."""
    assert guidance_schedule.varies and not GuidanceSchedule(rescale=0.5).varies
    expected = {(0.0, 0.0): (0, 2), (3.0, 0.0): (0, 1, 2), (3.0, 3.0): (0, 2), (1.0, 1.0): (2,), (1.0, 2.0): (1, 2)}
    assert {scales: branches(scales, guidance_schedule) for scales in expected} == expected


# --- rescaling ------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_rescaling_gives_back_a_share_of_the_standard_deviation(share, alone):
    plain, value = guide([6.0, 3.0]), guide([6.0, 3.0], GuidanceSchedule(rescale=share))
    own, wanted = plain.std(axis=1), alone[2].std(axis=1)
    assert np.abs(own / wanted - 1).min() > 0.05
    np.testing.assert_allclose(value.std(axis=1), share * wanted + (1 - share) * own, rtol=1e-4)
    gain = value / plain  # one number an example: contrast alone changes
    np.testing.assert_allclose(gain, np.broadcast_to(gain[:, :1], gain.shape), rtol=1e-4)


# --- compilation ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guidance_schedule", [GuidanceSchedule(), GuidanceSchedule("cosine", (0.1, 0.9), 0.5)], ids=["plain", "schedule"]
)
def test_traced_scales_compile_once_for_all(guidance_schedule):
    computed, seen = branches([3.0, 2.0], guidance_schedule), []
    network = stacked(computed, seen=seen)
    run = jax.jit(lambda x_t, scales: guided(network, scales, computed, NUM_STEPS, guidance_schedule)(x_t, T))
    for scales in ([3.0, 2.0], [1.5, 7.0], [1.0, 1.0]):
        close(run(X_T, [jnp.float32(scale) for scale in scales]), guide(scales, guidance_schedule))
    assert seen == [12]


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"kind": "linar"}, ["guidance schedule", "'linar'", "'linear'"]),
        ({"interval": (0.8, 0.2)}, ["guidance_interval", "(0.8, 0.2)"]),
        ({"interval": (0.2, 1.5)}, ["guidance_interval", "(0.2, 1.5)"]),
        ({"interval": (0.2,)}, ["guidance_interval", "(0.2,)"]),
        ({"rescale": 1.5}, ["guidance_rescale", 0, 1, 1.5]),
        ({"rescale": -0.5}, ["guidance_rescale", -0.5]),
    ],
)
def test_impossible_courses_say_what_to_do(fields, facts):
    with pytest.raises(UserError, check=mentions(*facts)):
        GuidanceSchedule(**fields)
