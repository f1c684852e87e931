"""The experiment in a stage's folder: experiment.json, or config.json as the version before 0.2 wrote it."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from dalle2_jax.config.experiment import Experiment
from dalle2_jax.errors import UsageError, UserError
from dalle2_jax.workdir.folder import EXPERIMENT, PREVIOUS, StageFolder


def stored_experiment(folder: StageFolder) -> Experiment | None:
    """Returns the experiment of a stage on disk, or None if there is none.

    Raises:
      UserError: the file is damaged, or is of another stage.
    """
    name = folder.experiment_file()
    if name is None:
        return None
    content = folder.read_json(name) or {}
    with errors_named(folder):
        experiment = Experiment.from_json(upgraded(content) if name == PREVIOUS else content)
        if experiment.stage != folder.stage:
            raise UsageError(f"this is the config of a stage {experiment.stage}")
    return experiment


def write_experiment(folder: StageFolder, experiment: Experiment) -> None:
    """Writes experiment.json, the description of the stage in its folder."""
    folder.write_json(EXPERIMENT, experiment.to_json())


@contextlib.contextmanager
def errors_named(folder: StageFolder) -> Iterator[None]:
    """Names the stored file in errors that follow from it."""
    try:
        yield
    except UsageError as error:
        raise UserError(f"{folder.path / (folder.experiment_file() or EXPERIMENT)}: {error}") from error


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a config.json of the previous version in this version's names.

    The bound of x_0 was called ``clip`` and was 1 in every diffusion stage that did not set it.
    """
    sampling = config.get("sampling")
    if not isinstance(sampling, Mapping) or config.get("stage") == "ar_prior":
        return dict(config)
    others = {name: value for name, value in sampling.items() if name != "clip"}
    return {**config, "sampling": {"clip_sample": sampling.get("clip", 1.0), **others}}
