"""diffusers' UnCLIPScheduler: the one config file in which unCLIP's pipelines keep a stage's diffusion."""

from collections.abc import Mapping
from typing import Any

from dalle2_jax.types import UserError
from dalle2_jax.weights.component import Source

_DEFAULTS = {
    "num_train_timesteps": 1000,
    "variance_type": "fixed_small_log",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "beta_schedule": "squaredcos_cap_v2",
}
"""What diffusers takes for a field that a file leaves out."""

_PREDICTIONS = {"epsilon": "eps", "sample": "x0"}
_VARIANCES = {"fixed_small_log": "fixed_small", "learned_range": "learned_range"}


def read_scheduler(source: Source, name: str, **defaults: Any) -> dict[str, dict[str, Any]]:
    """Returns what a pipeline's scheduler says of a stage: a part of its sections "diffusion" and "sampling".

    Args:
        source: the pipeline's folder.
        name: of the scheduler's folder in it.
        **defaults: what is taken of a file that is not there, in place of diffusers' own.

    Raises:
        UserError: a scheduler of another class, or a value that is not known here.
    """
    content = source.json(f"{name}/scheduler_config.json")
    where = source.path / name / "scheduler_config.json"
    said = _DEFAULTS | (defaults if content is None else content)
    if said.get("_class_name", "UnCLIPScheduler") != "UnCLIPScheduler":
        raise UserError(f"{where} is a {said['_class_name']}: unCLIP's stages are sampled by an UnCLIPScheduler")
    known = {"prediction_type": _PREDICTIONS, "variance_type": _VARIANCES, "beta_schedule": ("squaredcos_cap_v2",)}
    for field, values in known.items():
        if said[field] not in values:
            raise UserError(f"{where}: {field} {said[field]!r} is not known here: {', '.join(values)} can be read")
    steps, bound = said["num_train_timesteps"], said["clip_sample_range"]
    if type(steps) is not int or steps < 1 or not isinstance(bound, int | float) or bound <= 0:
        raise UserError(f"{where}: num_train_timesteps {steps!r} or clip_sample_range {bound!r} is no number above 0")
    variance = _VARIANCES[said["variance_type"]]
    return {
        "diffusion": {
            "schedule": "cosine",
            "num_steps": steps,
            "prediction": _PREDICTIONS[said["prediction_type"]],
            "variance": variance,
            "loss": "hybrid" if variance == "learned_range" else "mse",
        },
        "sampling": {"name": "ddpm", "clip": float(bound) if said["clip_sample"] else None},
    }


def scheduler_file(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the scheduler's config file for a stage's config, which says at least what `read_scheduler` returns.

    How many steps to take, and by which sampler, no such file says.

    Raises:
        UserError: a diffusion that UnCLIPScheduler does not have; it begins with ``where``.
    """
    diffusion, sampling = config["diffusion"], config["sampling"]
    plain = {"schedule": "cosine", "zero_terminal_snr": False, "resolution_shift": 1.0}
    for field, value in plain.items():
        if diffusion.get(field, value) != value:
            raise UserError(f"{where}: UnCLIPScheduler has no {field} {diffusion[field]!r}")
    predictions, variances = ({ours: theirs for theirs, ours in table.items()} for table in (_PREDICTIONS, _VARIANCES))
    prediction, variance = diffusion["prediction"], diffusion.get("variance", "fixed_small")
    if prediction not in predictions or variance not in variances:
        raise UserError(f"{where}: UnCLIPScheduler predicts no {prediction!r} with variance {variance!r}")
    if sampling.get("threshold", "static") != "static":
        raise UserError(f"{where}: UnCLIPScheduler has no threshold {sampling['threshold']!r}")
    bound = sampling.get("clip", 1.0)
    return {
        "_class_name": "UnCLIPScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": bound is not None,
        "clip_sample_range": 1.0 if bound is None else bound,
        "num_train_timesteps": diffusion.get("num_steps", 1000),
        "prediction_type": predictions[prediction],
        "variance_type": variances[variance],
    }
