"""The config file of diffusers' UnCLIPScheduler, which describes the diffusion of a stage."""

from typing import Any

from dalle2_jax.errors import WeightsError
from dalle2_jax.stages import DiffusionStage
from dalle2_jax.weights.component import Source
from dalle2_jax.weights.config_files import DIFFUSERS, Known, Section, warn

_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "variance_type": "fixed_small_log",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "beta_schedule": "squaredcos_cap_v2",
}
"""Defaults of diffusers for missing fields."""

_SCHEDULER = DIFFUSERS | Known(_DEFAULTS)

_PREDICTIONS = {"epsilon": "eps", "sample": "x0"}
_VARIANCES = {"fixed_small_log": "fixed_small", "learned_range": "learned_range"}


def read_scheduler(source: Source, name: str, **defaults: Any) -> dict[str, dict[str, Any]]:
    """Reads the scheduler of a stage in a pipeline's folder.

    Args:
        source: the pipeline's folder.
        name: the scheduler's folder in it.
        **defaults: fields to assume if the file is missing and no pipeline refers to it.

    Returns:
        Fields of the sections "diffusion" and "sampling" of the stage's config.

    Raises:
        WeightsError: a scheduler of another class, an unsupported value, or a pipeline without its scheduler.
    """
    section = source.section(f"{name}/scheduler_config.json")
    where = str(source.path / name / "scheduler_config.json")
    assumed = section is None
    if section is None:
        if source.json("model_index.json") is not None:
            raise WeightsError(f"{where} is missing, but {source.path / 'model_index.json'} lists {name}", where)
        warn(f"{where} is missing: a cosine schedule of 1000 steps with Karlo's prediction and clipping is assumed")
        section = Section(defaults, where)
    section.check(_SCHEDULER)
    section.string("_class_name", ("UnCLIPScheduler",), "UnCLIPScheduler" if assumed else None)
    prediction = section.string("prediction_type", tuple(_PREDICTIONS), _DEFAULTS["prediction_type"])
    variance = _VARIANCES[section.string("variance_type", tuple(_VARIANCES), _DEFAULTS["variance_type"])]
    section.string("beta_schedule", ("squaredcos_cap_v2",), _DEFAULTS["beta_schedule"])
    steps = section.positive_int("num_train_timesteps", _DEFAULTS["num_train_timesteps"], most=100_000)
    clips, bound = section.boolean("clip_sample", _DEFAULTS["clip_sample"]), None
    if clips:
        bound = section.number("clip_sample_range", _DEFAULTS["clip_sample_range"], least=1e-9)
    return {
        "diffusion": {
            "schedule": "cosine",
            "num_steps": steps,
            "prediction": _PREDICTIONS[prediction],
            "variance": variance,
            "loss": "hybrid" if variance == "learned_range" else "mse",
        },
        "sampling": {"name": "ddpm", "clip_sample": bound},
    }


def scheduler_file(stage: DiffusionStage, where: str) -> dict[str, Any]:
    """Returns the config file of UnCLIPScheduler for a stage. It has no fields for the sampler and its steps.

    Raises:
        WeightsError: UnCLIPScheduler does not support the diffusion; the message begins with ``where``.
    """
    diffusion, sampling = stage.diffusion, stage.sampling
    predictions, variances = ({ours: theirs for theirs, ours in table.items()} for table in (_PREDICTIONS, _VARIANCES))
    supported = {
        "schedule": (diffusion.schedule, ["cosine"]),
        "zero_terminal_snr": (diffusion.zero_terminal_snr, [False]),
        "resolution_shift": (diffusion.resolution_shift, [1.0]),
        "prediction": (diffusion.prediction, [*predictions]),
        "variance": (diffusion.variance, [*variances]),
        "threshold": (sampling.threshold, ["static"]),
    }
    for field, (value, values) in supported.items():
        if value not in values:
            raise WeightsError(f"{where}: UnCLIPScheduler does not support {field} {value!r}")
    return {
        "_class_name": "UnCLIPScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": sampling.clip_sample is not None,
        "clip_sample_range": 1.0 if sampling.clip_sample is None else sampling.clip_sample,
        "num_train_timesteps": diffusion.num_steps,
        "prediction_type": predictions[diffusion.prediction],
        "variance_type": variances[diffusion.variance],
    }
