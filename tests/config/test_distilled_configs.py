"""Configs of distilled stages: what they say is checked before anything is loaded, and is stored."""

import pytest
import tiny_system
from ml_collections import ConfigDict
from raised import mentions

from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.inherit import inherited
from dalle2_jax.config.page_defaults import distilled
from dalle2_jax.errors import ConfigError


def config_of(stage="decoder", **overrides) -> ConfigDict:
    """The config of a student of a tiny stage; ``a__b`` is the field a.b."""
    config = distilled(tiny_system.get_config(stage), {"steps": "8"}, "8/4", "runs/tiny", total_steps=4)
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in overrides.items()})
    return config


@pytest.mark.parametrize("stage", ["prior", "decoder", "upsampler_1"])
def test_an_experiment_is_stored_with_its_teacher_and_its_steps(stage):
    experiment = Experiment.from_config(config_of(stage))
    experiment.check_trainable()
    stored = experiment.to_json()
    assert (stored["teacher"]["steps"], stored["sampling"]["steps"], stored["sampling"]["guidance"]) == (
        "8",
        "8/4",
        1.0,
    )
    assert Experiment.from_json(stored) == experiment and experiment.spec.distilled
    plain = Experiment.from_config(tiny_system.get_config(stage))
    assert "teacher" not in plain.to_json() and not plain.spec.distilled


def test_the_network_is_the_teachers():
    """The architecture, the prediction and the schedule come from the system of the teacher, whatever the page says."""
    other = config_of(model__unet__channels=16, diffusion__prediction="x0", diffusion__num_steps=50)
    base = Experiment.from_config(tiny_system.get_config("decoder"))
    joined = inherited(Experiment.from_config(other), base)
    assert joined.spec.model == base.spec.model
    assert (joined.spec.diffusion.prediction, joined.spec.diffusion.num_steps) == ("v", 100)
    assert joined.spec.teacher == Experiment.from_config(other).spec.teacher
    joined.check_trainable()


@pytest.mark.parametrize(
    ("overrides", "field", "facts"),
    [
        ({"init_from": ""}, "teacher", ["--config.init_from"]),
        ({"sampling__steps": "8/3"}, "sampling.steps", [3, 8]),
        ({"sampling__steps": "8/8"}, "sampling.steps", [8]),
        ({"sampling__steps": "4"}, "sampling.steps", [4, 8]),
        ({"sampling__steps": "200/4"}, "sampling.steps", [200, 100]),
        ({"teacher__steps": "200"}, "teacher.steps", [200, 100]),
        ({"teacher__steps": "9"}, "sampling.steps", [9]),
        ({"teacher__name": "ddpm"}, "teacher.name", ["'ddim'", "'ddpm'"]),
        ({"sampling__name": "dpmpp_2m"}, "sampling.name", ["'ddim'", "'dpmpp_2m'"]),
    ],
)
def test_mistakes_name_their_field(overrides, field, facts):
    with pytest.raises(ConfigError, check=mentions(*facts)) as raised:
        Experiment.from_config(config_of(**overrides)).check_trainable()
    assert raised.value.field == field


def test_guidance_of_a_student_is_its_teachers():
    config = config_of()
    config.teacher.guidance = 2.0
    Experiment.from_config(config).check_trainable()
    config.sampling.guidance = 2.0
    with pytest.raises(ConfigError, check=mentions("teacher.guidance")) as raised:
        Experiment.from_config(config).check_trainable()
    assert raised.value.field == "sampling.guidance"


def test_a_lora_is_not_distilled():
    config = config_of()
    config.lora = {"rank": 2}
    with pytest.raises(ConfigError, check=mentions("lora", "teacher", field="lora")):
        Experiment.from_config(config).check_trainable()


@pytest.mark.parametrize("stage", ["clip", "ar_prior"])
def test_a_stage_without_diffusion_has_no_teacher(stage):
    config = tiny_system.get_config(stage)
    config.teacher = {"steps": 8}
    with pytest.raises(ConfigError, check=mentions("'teacher'")):
        Experiment.from_config(config)
