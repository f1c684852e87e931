"""Distillation by theory: where a target leads, what a student of such targets samples, and who is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic_denoisers import denoiser_of, exact_flow, gaussian_law, keys, mixture_law, normals, relative_error
from raised import mentions

from dalle2_jax import rng
from dalle2_jax.diffusion import (
    Objective,
    SamplerConfig,
    SamplingOptions,
    StudentSteps,
    distillation_loss,
    distillation_target,
    make_schedule,
    predictor,
    q_sample,
    respace,
    sample,
    thresholding,
    training_loss,
    with_zero_terminal_snr,
)
from dalle2_jax.errors import UserError

COSINE = make_schedule("cosine", 1000)
LAW = mixture_law((0.3, 0.7), (-1.0, 0.8), (0.1, 0.2))
SHARES, MEANS, STDS = (0.3, 0.7), (-1.0, 0.8), (0.1, 0.2)


def steps_of(spec, schedule=COSINE):
    """The steps of "M/N": a teacher of M steps and its student of N."""
    return StudentSteps(respace(schedule, spec.partition("/")[0]), respace(schedule, spec))


def mixture_points(count, seed=0):
    """Samples of the mixture, float32[count, 1]."""
    random = np.random.default_rng(seed)
    mode = random.choice(2, size=count, p=SHARES)
    points = np.asarray(MEANS)[mode] + np.asarray(STDS)[mode] * random.standard_normal(count)
    return jnp.asarray(points[:, None], jnp.float32)


# --- where a target leads ---------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["x0", "v", "eps"])
def test_a_student_of_exact_targets_ends_where_its_teacher_does(prediction):
    """Its 4 steps end where the teacher's 20 do, from the same x_T, whatever the teacher predicts."""
    schedule = make_schedule("linear", 1000)
    denoiser, steps = denoiser_of(schedule, prediction, LAW), steps_of("20/4", schedule)
    teacher, x_T = predictor(prediction, denoiser, thresholding("static", 1.0, 1.0)), normals((64, 1))

    def student(x_t, t):
        return distillation_target(steps, teacher, x_t, t).x_0

    def ends(spec, kind, network):
        config, options = SamplerConfig("ddim", spec, clip_sample=1.0), SamplingOptions(x_T=x_T)
        return sample(schedule, config, kind, network, keys(64), (1,), options=options)

    expected = ends("20", prediction, denoiser)
    assert relative_error(ends("20/4", "x0", student), expected) < 1e-4
    assert relative_error(ends("20/4", prediction, denoiser), expected) > 0.1


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_target_of_many_steps_is_the_end_of_the_flow(number):
    """E[x_0 | x] where 250 steps from the student's level ``number`` lead is that of the integrated equation.

    The error is of first order: a fourth of the steps have four times the error.
    """
    x_0, eps = mixture_points(256), normals((256, 1), 1)
    found, expected = {}, None
    for spec in ("1000/4", "248/4"):
        steps = steps_of(spec)
        t = jnp.full(256, steps.student.timesteps[number])
        x_t = q_sample(COSINE, x_0, t, eps)
        target = distillation_target(steps, predictor("x0", denoiser_of(COSINE, "x0", LAW)), x_t, t)
        signal, noise = steps.student.signal_rate[number - 1], steps.student.noise_rate[number - 1]
        ended = signal * np.asarray(target.x_0, np.float64) + noise * np.asarray(target.eps, np.float64)
        start, end = steps.student.log_snr[number], steps.student.log_snr[number - 1]
        expected = exact_flow(LAW, np.asarray(x_t, np.float64), start, end, steps=400)
        found[spec] = np.abs(LAW(ended, np.float64(signal), np.float64(noise)) - expected).mean()
    assert found["1000/4"] < 0.02
    assert 2.5 < found["248/4"] / found["1000/4"] < 6


def test_one_step_of_the_teacher_is_its_own_target():
    """With (x_0, eps) of the teacher at each step, eq. (3): a mean of its predictions, here all the same."""
    steps = steps_of("20/4")
    x_t, t = normals((4, 3)), jnp.asarray(steps.student.timesteps.astype(np.int32))
    point = denoiser_of(COSINE, "x0", gaussian_law(np.array([0.3, -0.2, 0.9]), np.zeros((3, 3))))
    target = distillation_target(steps, predictor("x0", point), x_t, t)
    np.testing.assert_allclose(target.x_0, np.tile([0.3, -0.2, 0.9], (4, 1)), atol=2e-4)


def test_a_target_stays_in_the_range_to_which_the_teacher_is_clipped():
    steps, bound = steps_of("20/4"), 0.7
    x_0, t = mixture_points(400), jnp.asarray(np.repeat(steps.student.timesteps, 100).astype(np.int32))
    x_t = q_sample(COSINE, x_0, t, normals((400, 1)))
    denoiser = denoiser_of(COSINE, "x0", LAW)
    free = distillation_target(steps, predictor("x0", denoiser), x_t, t).x_0
    clipped = distillation_target(steps, predictor("x0", denoiser, thresholding("static", bound, 1.0)), x_t, t).x_0
    assert float(jnp.abs(free).max()) > 0.9
    assert float(jnp.abs(clipped).max()) <= bound * (1 + 1e-4)


def test_each_example_starts_at_its_own_step():
    """An example's target does not depend on the others, nor on their steps."""
    steps, teacher = steps_of("20/4"), predictor("x0", denoiser_of(COSINE, "x0", LAW))
    x_t, t = normals((4, 1)), jnp.asarray(steps.student.timesteps[[2, 0, 3, 1]].astype(np.int32))
    together = distillation_target(steps, teacher, x_t, t)
    for i in range(4):
        alone = distillation_target(steps, teacher, x_t[i : i + 1], t[i : i + 1])
        np.testing.assert_allclose(together.x_0[i : i + 1], alone.x_0, rtol=1e-5)


def test_a_schedule_that_ends_in_pure_noise():
    schedule = with_zero_terminal_snr(COSINE)
    steps, x_t = steps_of("20/4", schedule), normals((8, 1))
    t = jnp.full(8, steps.student.timesteps[-1])
    target = distillation_target(steps, predictor("v", denoiser_of(schedule, "v", LAW)), x_t, t)
    assert np.isfinite(target.x_0).all()
    np.testing.assert_allclose(target.eps, x_t, atol=1e-6)


# --- the student ------------------------------------------------------------------------------


def features(x_t, t, steps, count=30):
    """float32[B, N count]: smooth bumps along x_t, a set of them for each of the student's steps."""
    centres = jnp.linspace(-3.0, 3.0, count)[None]
    bumps = jnp.exp(-0.5 * jnp.square((x_t - centres) * (count / 6)))
    bumps = jnp.concatenate([bumps, jnp.ones_like(x_t), x_t], axis=1)
    own = t[:, None] == jnp.asarray(steps.student.timesteps.astype(np.int32))[None]
    return jnp.where(own[:, :, None], bumps[:, None], 0.0).reshape(len(x_t), -1)


def distance(samples):
    """Wasserstein-1 distance to the mixture."""
    count = len(samples)
    return float(
        np.abs(np.sort(np.asarray(samples)[:, 0]) - np.sort(np.asarray(mixture_points(count, 7))[:, 0])).mean()
    )


@pytest.mark.numerics
def test_a_trained_student_samples_the_data_in_few_steps():
    """A student that is linear in its weights: one step of Newton's method minimises the loss exactly.

    Plain DDIM of as many steps, with the perfect network, misses the mixture by far more.
    """
    steps, objective = steps_of("64/4"), Objective("x0", weighting="snr")
    denoiser, count = denoiser_of(COSINE, "x0", LAW), 2048
    x_0 = mixture_points(count, 1)
    t = steps.sample_timesteps(jax.random.key(3), count)

    def loss(weights):
        networks = lambda x_t, t: features(x_t, t, steps) @ weights[:, None], predictor("x0", denoiser)
        losses, _ = distillation_loss(COSINE, objective, steps, networks, x_0, t, rng.root(0))
        return losses.mean() + 1e-7 * jnp.square(weights).sum()

    start = jnp.zeros(4 * 32)
    gradient, hessian = jax.jit(jax.grad(loss))(start), jax.jit(jax.hessian(loss))(start)
    weights = jnp.asarray(np.linalg.solve(np.float64(hessian), -np.float64(gradient)), jnp.float32)
    assert float(loss(weights)) < 0.05 * float(loss(start))

    def samples(network, spec):
        return jax.jit(lambda: sample(COSINE, SamplerConfig("ddim", spec), "x0", network, keys(2048), (1,)))()

    student = distance(samples(lambda x_t, t: features(x_t, t, steps) @ weights[:, None], "64/4"))
    plain, teacher = distance(samples(denoiser, "64/4")), distance(samples(denoiser, "64"))
    assert student < plain / 3 and student < teacher + 0.02


def constant_student(x_t, t):
    """Predicts 1/4, and something for a variance."""
    return jnp.concatenate([jnp.full_like(x_t, 0.25), x_t], axis=1)


def half_student(x_t, t):
    """Predicts half of its input."""
    return 0.5 * x_t


def test_the_loss_is_the_weighted_error_of_the_target():
    """For each prediction type, in the parameterisation of the student; a learned variance is not trained."""
    steps = steps_of("20/4")
    t = jnp.asarray(steps.student.timesteps.astype(np.int32))
    x_0, noise, teacher = mixture_points(4), normals((4, 1)), predictor("x0", denoiser_of(COSINE, "x0", LAW))
    target = distillation_target(steps, teacher, q_sample(COSINE, x_0, t, noise), t)
    signal, rate = (np.asarray(table, np.float64) for table in (COSINE.signal_rate[t], COSINE.noise_rate[t]))
    expected = {
        "x0": np.asarray(target.x_0)[:, 0],
        "v": signal * np.asarray(target.eps)[:, 0] - rate * np.asarray(target.x_0)[:, 0],
    }
    for prediction, wanted in expected.items():
        objective = Objective(prediction, "learned_range", "hybrid", "min_snr")
        networks = constant_student, teacher
        losses, metrics = distillation_loss(COSINE, objective, steps, networks, x_0, t, None, noise)
        snr = (signal / rate) ** 2
        weight = np.minimum(snr, 5.0) / {"x0": 1.0, "v": snr + 1}[prediction]
        np.testing.assert_allclose(losses, weight * (wanted - 0.25) ** 2, rtol=2e-3, atol=1e-9)
        np.testing.assert_allclose(metrics["mse"], ((wanted - 0.25) ** 2).mean(), rtol=1e-3)


def test_a_point_mass_is_distilled_by_its_ordinary_loss():
    """Where every step predicts the same x_0, the targets are those of training on data."""
    steps = steps_of("20/4")
    t, noise = jnp.asarray(steps.student.timesteps.astype(np.int32)), normals((4, 2))
    x_0 = jnp.full((4, 2), 0.4)
    point = denoiser_of(COSINE, "x0", gaussian_law(np.array([0.4, 0.4]), np.zeros((2, 2))))
    objective, networks = Objective("x0", weighting="snr"), (half_student, predictor("x0", point))
    distilled, _ = distillation_loss(COSINE, objective, steps, networks, x_0, t, None, noise)
    plain, _ = training_loss(COSINE, objective, half_student, x_0, t, None, noise)
    np.testing.assert_allclose(distilled, plain, rtol=2e-3)


def test_no_gradient_reaches_the_teacher():
    steps, objective = steps_of("20/4"), Objective("x0")
    x_0, t = mixture_points(4), jnp.asarray(steps.student.timesteps.astype(np.int32))

    def loss(student, teacher):
        networks = lambda x_t, t: student * x_t, predictor("x0", lambda x_t, t: jnp.tanh(teacher * x_t))
        return distillation_loss(COSINE, objective, steps, networks, x_0, t, rng.root(0))[0].mean()

    of_student, of_teacher = jax.grad(loss, argnums=(0, 1))(jnp.float32(0.5), jnp.float32(0.5))
    assert abs(float(of_student)) > 1e-3 and float(of_teacher) == 0
    both = jax.grad(lambda weight: loss(weight, weight))(jnp.float32(0.5))
    np.testing.assert_allclose(both, of_student, rtol=1e-6)


def test_the_timesteps_are_the_students_own():
    steps = steps_of("20/4")
    sampled = np.asarray(steps.sample_timesteps(jax.random.key(0), 4000))
    values, counts = np.unique(sampled, return_counts=True)
    assert values.tolist() == steps.student.timesteps.tolist() == [210, 473, 736, 999]
    assert (abs(counts - 1000) < 150).all() and steps.stride == 5


# --- steps that do not fit --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "student", "facts"),
    [
        ("20", "20", [20, "10"]),
        ("20", "3", [3, 20, "1, 2, 4, 5, 10"]),
        ("20", "40", [40, 20]),
        ("20", "4", ["210", "473", "0, 333, 666, 999"]),
        ("20", "logsnr20/4", ["210", "904"]),
    ],
)
def test_steps_that_do_not_fit_are_rejected(teacher, student, facts):
    with pytest.raises(UserError, check=mentions(*facts)):
        StudentSteps(respace(COSINE, teacher), respace(COSINE, student))


def test_a_student_may_be_the_next_teacher():
    first, second = steps_of("16/4"), steps_of("16/4/2")
    again = StudentSteps(first.student, second.student)
    assert again.stride == 2 and second.student.timesteps.tolist() == first.student.timesteps[1::2].tolist()
    assert dataclasses.replace(second, teacher=first.student) == again
