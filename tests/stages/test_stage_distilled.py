"""Distilled stages: the targets are the guided teacher's own steps, and a student is sampled in its steps alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe import Probe, batch, condition, keys, params
from raised import mentions

from dalle2_jax import rng
from dalle2_jax.errors import ConfigError, UserError
from dalle2_jax.stages import DiffusionConfig, SamplingConfig, Variables

CONFIG = DiffusionConfig("x0", num_steps=100)
TEACHER = SamplingConfig("ddim", 20, image_guidance=3.0, text_guidance=1.5, clip_sample=1.5)
STUDENT = SamplingConfig("ddim", "20/4", clip_sample=1.5)
LEVELS = [21, 47, 73, 99]
"""Timesteps of the student."""


def distilled(drops=0.0, **fields):
    """A student of the probe, some of whose condition is dropped in training."""
    stage = Student(CONFIG, STUDENT, teacher=TEACHER)
    return dataclasses.replace(stage, rate=drops, **fields)


@dataclasses.dataclass(frozen=True)
class Student(Probe):
    """A probe that drops both parts of its condition at one rate."""

    rate: float = 0.0

    @property
    def drop_rates(self):
        return {"image": self.rate, "text": self.rate}


def frozen(gain=0.8, conditioning=0.3):
    """The variables of the teacher."""
    return {"probe": Variables(params(gain, conditioning), {})}


def teacher_steps(x_t, count, absent):
    """x after the first ``count`` of the teacher's 20 steps from x_T, sampled as any stage is."""
    stage = Student(CONFIG, TEACHER)
    gone = {name: jnp.full(len(x_t), absent) for name in ("image", "text")}
    plan = stage.plan(absent=gone, x_T=jnp.asarray(x_t), trajectory=True)
    states = stage.sample_x_0(params(0.8, 0.3), keys(len(x_t)), condition(len(x_t)), plan)
    return np.asarray(states[count - 1], np.float64)


@pytest.mark.parametrize("absent", [False, True])
def test_the_loss_is_the_error_of_the_guided_teachers_steps(absent):
    """From the noisiest level: the sampler's own 5 steps under both scales, and one step of DDIM to the same point."""
    size, stage = 6, distilled(float(absent))
    examples, noise = batch(size), jnp.asarray(batch(size, seed=3)["x"])
    given = {"t": jnp.full(size, LEVELS[-1]), "noise": noise}
    loss, outputs = stage.loss(params(), {}, frozen(), rng.root(0), examples, **given)
    rates = [(stage.schedule.signal_rate[t], stage.schedule.noise_rate[t]) for t in LEVELS]
    (signal_end, noise_end), (signal, rate) = rates[-2:]
    x_t = np.float64(signal * examples["x"] + rate * np.asarray(noise))
    z = teacher_steps(np.float32(x_t), 5, absent)
    target = (z - noise_end / rate * x_t) / (signal_end - noise_end / rate * signal)
    drops = {name: jnp.full(size, absent) for name in ("image", "text")}
    student = stage.bind(params(), condition(size), drops, None)(jnp.float32(x_t), given["t"])
    np.testing.assert_allclose(loss, np.square(np.asarray(student) - target).mean(), rtol=2e-4)
    np.testing.assert_allclose(outputs.metrics["mse"], loss, rtol=1e-6)
    assert np.abs(target).max() <= 1.5 * (1 + 1e-4)


def test_the_student_is_trained_at_its_own_steps_and_the_teacher_is_not():
    stage, examples = distilled(0.3), batch(64)

    def loss(student, teacher):
        return stage.loss(student, {}, {"probe": Variables(teacher, {})}, rng.root(0), examples)[0]

    of_student, of_teacher = jax.grad(loss, argnums=(0, 1))(params(), params(0.8, 0.3))
    assert float(jnp.abs(of_student["kernel"]).min()) > 0 and not of_teacher["kernel"].any()
    student, teacher = stage.seen[0], stage.seen[1]
    assert student["training"] and not teacher["training"]
    assert (student["rows"], teacher["rows"]) == (64, 3 * 64)  # f_0, f_1 and f_2 in one call
    for name in ("image", "text"):
        np.testing.assert_array_equal(teacher[name][-64:], student[name])  # the teacher lacks what the student lacks
        assert 5 < int(student[name].sum()) < 40


def test_a_teacher_is_required_under_the_stages_own_name():
    assert distilled().requires == ("probe",) and Student(CONFIG, STUDENT).requires == ()
    assert distilled().student_steps.student.timesteps.tolist() == LEVELS


def test_the_importance_of_timesteps_has_no_part_in_distillation():
    stage = distilled(diffusion=dataclasses.replace(CONFIG, timesteps="loss_second_moment"))
    assert stage.init_stats() == {}
    assert dataclasses.replace(stage, teacher=None).init_stats().keys() == {"losses", "counts"}
    loss, outputs = stage.loss(params(), {}, frozen(), rng.root(0), batch(4))
    assert np.isfinite(loss) and outputs.stats == {}


def test_a_step_of_the_student_is_one_evaluation():
    stage = distilled()
    stage.check_sampling(stage.sampling)
    samples = stage.sample_x_0(params(), keys(3), condition(3), stage.plan())
    (call,) = stage.seen  # traced once, in a loop of 4 steps
    assert call["rows"] == 3 and samples.shape == (3, 4) and stage.plan().branches == (2,)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"steps": 4}, "probe.steps"),
        ({"steps": "20/2"}, "probe.steps"),
        ({"steps": 20}, "probe.steps"),
        ({"guidance": 3.0}, "probe.guidance"),
        ({"guidance": 0.0}, "probe.guidance"),
        ({"text_guidance": 2.0}, "probe.text_guidance"),
        ({"name": "ddpm"}, "probe.name"),
        ({"name": "dpmpp_2m"}, "probe.name"),
        ({"eta": 0.5}, "probe.name"),
    ],
)
def test_a_student_is_sampled_in_its_own_way_only(fields, field):
    stage = distilled()
    config = dataclasses.replace(stage.sampling, **fields)
    with pytest.raises(ConfigError, check=mentions(field)) as raised:
        stage.check_sampling(config)
    assert raised.value.field == field


def test_the_same_steps_may_be_written_in_another_way():
    stage = distilled()
    stage.check_sampling(dataclasses.replace(stage.sampling, steps="t:21,47,73,99", clip_sample=None))
    stage.check_sampling(dataclasses.replace(stage.sampling, name="euler"))


def test_a_student_has_no_inversion_and_no_likelihood():
    stage, x_0 = distilled(), jnp.asarray(batch(2)["x"])
    with pytest.raises(UserError, check=mentions("probe", "distilled")):
        stage.invert(params(), x_0, condition(2), 4)
    with pytest.raises(UserError, check=mentions("probe", "distilled")):
        stage.bits_per_dim(params(), keys(2), x_0, condition(2))
    with pytest.raises(UserError, check=mentions("probe", "teacher")):
        _ = Student(CONFIG, STUDENT).student_steps
