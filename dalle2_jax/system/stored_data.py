"""The data set that a system's stored experiment names, opened only if the user trusts where the system comes from."""

import dataclasses
import pathlib
from typing import Any

from dalle2_jax import data
from dalle2_jax.config import sources
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.sources import PythonDataConfig, SourceConfig
from dalle2_jax.config.stored import stored_experiment
from dalle2_jax.data.configs import ImagesConfig
from dalle2_jax.errors import DataError, UserError
from dalle2_jax.system import load
from dalle2_jax.workdir.folder import StageFolder

DATA_PATHS = ("path", "embeddings", "text_path")
"""Fields of section ``data`` that hold a path or a URL."""


def open_stored_source(
    system: pathlib.Path, name: str, split: str, trusted: bool = False, **changes: Any
) -> data.Source:
    """Opens a split of the data set that the stored experiment of a system's stage names.

    A system may come from an untrusted source, and its experiment may name any path of this machine, or a URL: that is
    opened only if the user trusts the system. Generated data have no path and are always opened.

    Args:
      system: the workdir.
      name: of the stage.
      split: "train" or "val".
      trusted: whether the user trusts the system (``--trust_system``).
      **changes: fields of section ``data`` that the user sets; those that the data set does not have are ignored.

    Raises:
      DataError: the experiment names no data, or the user does not trust the system.
      UserError: there is no such stage, or the data cannot be read.
    """
    folder = StageFolder(system, name)
    experiment = stored_experiment(folder)
    if experiment is None:
        raise UserError(load.missing_stage(system, name))
    config = experiment.data
    if config is not None and not trusted and not _is_safe(config):
        raise DataError(
            f"{folder.path}/{folder.experiment_file()} names data outside the system ({_named(config)}): name the data "
            "yourself (--data KIND:PATH), or give --trust_system if you trust where the system comes from",
            folder.path,
        )
    return open_changed(experiment, split, **changes)


def open_changed(experiment: Experiment, split: str, **changes: Any) -> data.Source:
    """Opens a split of an experiment's data set, with other values for some of its fields.

    Args:
      experiment: of a stage.
      split: "train" or "val".
      **changes: values by field of the data set's config; other names are ignored.
    """
    config = experiment.data
    known = () if config is None else [field.name for field in dataclasses.fields(config)]
    given: dict[str, Any] = {key: value for key, value in changes.items() if key in known}
    if given and isinstance(config, data.MixtureConfig):  # the parts have the mixture's resolution
        parts = {name: dataclasses.replace(part, **given) for name, part in dict(config.parts).items()}
        given["parts"] = parts
    return sources.open_source(
        dataclasses.replace(config, **given) if config is not None and given else config,
        split,
        experiment.preprocessing,
    )


def image_side(system: pathlib.Path, stage: str) -> int:
    """Returns the side of the images that a stage is evaluated on: its data's, its own, or that of the system's CLIP.

    Raises:
      UserError: the stage has no images, and the system has no CLIP.
    """
    experiment, clip = (stored_experiment(StageFolder(system, name)) for name in (stage, "clip"))
    sides = [experiment.resolution, experiment.spec.image_size] if experiment else []
    sides += [clip.spec.image_size] if clip else []
    side = next((side for side in sides if side), None)
    if side is None:
        raise UserError(f"neither stage {stage} nor clip of {system} has images: there is no size to evaluate it at")
    return side


def has_image_files(system: pathlib.Path, stage: str) -> bool:
    """Whether a stage was trained on files of images, as opposed to generated or embedded ones."""
    experiment = stored_experiment(StageFolder(system, stage))
    return experiment is not None and isinstance(experiment.data, ImagesConfig)


def _is_safe(config: SourceConfig) -> bool:
    """Whether a data set lies at no path: generated data, and data that were given in Python."""
    if isinstance(config, data.MixtureConfig):
        return all(map(_is_safe, dict(config.parts).values()))
    return isinstance(config, data.ShapesConfig | PythonDataConfig)


def _named(config: SourceConfig) -> str:
    """Returns the paths and URLs that a data set's config names."""
    if isinstance(config, data.MixtureConfig):
        return ", ".join(_named(part) for part in dict(config.parts).values() if not _is_safe(part))
    names = [field.name for field in dataclasses.fields(config) if field.name in DATA_PATHS]
    return ", ".join(str(getattr(config, name)) for name in names if getattr(config, name))
