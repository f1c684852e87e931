"""Fine-tuning: a stage that starts from the averaged weights of the same stage of another system.

``config.init_from`` names that system, the base. What the network is and what it predicts comes from the base's
stored config, whatever the config of the run says of it; how the network is computed and trained stays the run's own
(``OWN``). The config that is stored is the two as one, so that nothing but a LoRA needs the base afterwards.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from dalle2_jax.types import UsageError, UserError
from dalle2_jax.workdir import StageFolder

OWN = {
    # a section that comes from the base: its fields that stay the run's own, at any depth
    "model": ("dtype", "remat", "dropout"),
    "text": (),
    "embedding": (),
    "conditioning": (
        *("drop_image", "drop_text", "crop_fraction"),
        *("blur_sigma", "blur_rate", "degradation", "sample_noise"),
    ),
    "diffusion": ("weighting", "max_weight", "gamma", "k", "timesteps"),
}
"""All other sections are the run's own: data, optim, mesh, sampling, lora. The loss comes with the variance."""


def with_base(config: Mapping[str, Any], root: pathlib.Path, name: str) -> tuple[dict[str, Any], StageFolder | None]:
    """Returns the config that a run is built from and stores, and the stage that it starts from, None if from nothing.

    Once the run has a checkpoint, its own stored config takes the base's place, and the base may be gone.

    Args:
      config: as the user gives it; ``init_from`` is a path from where the command runs.
      root: the run's workdir. The returned config's ``init_from`` is the path from there.
      name: of the stage.

    Raises:
      UserError: there is no such system, it lacks the stage, or it is the run's own; or a LoRA of nothing.
    """
    if not config.get("init_from"):
        if "lora" in config:
            raise UsageError("config.lora changes a trained stage: name its system, as in --config.init_from=runs/demo")
        return {key: value for key, value in config.items() if key != "init_from"}, None
    if not isinstance(config["init_from"], str):
        raise UsageError(f"config.init_from must be the folder of a system, not {config['init_from']!r}")
    folder, base = StageFolder(root, name), StageFolder(pathlib.Path(config["init_from"]), name)
    if base.root.resolve() == root.resolve():
        raise UserError(f"config.init_from {base.root} is the workdir itself: give another --workdir")
    stored = folder.read_json("config.json") if resumes(folder, base) else _config_of(base)
    path = os.path.relpath(base.root.resolve(), root.resolve())
    return inherited(config, stored) | {"init_from": path}, base


def resumes(folder: StageFolder, base: StageFolder | None) -> bool:
    """Whether a run has a checkpoint of its own: a link to the base's stage is not one."""
    return folder.latest_step() is not None and not (base and folder.is_link_to(base))


def _config_of(base: StageFolder) -> dict[str, Any]:
    if not base.root.is_dir():
        raise UserError(f"config.init_from: there is no system at {base.root}")
    stored = base.read_json("config.json")
    if stored is None:
        there = ", ".join(sorted(path.parent.name for path in base.root.glob("*/config.json")))
        raise UserError(f"config.init_from: system {base.root} has no stage {base.stage}, only {there or 'none'}")
    return stored


def inherited(config: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``config`` with the sections and fields of the base's config that say what the network is."""
    merged = {key: value for key, value in config.items() if key not in OWN}
    for section, own in OWN.items():
        fields = _joined(base.get(section, {}), config.get(section, {}), own)
        if fields or section in base:
            merged[section] = fields
    return merged


def _joined(base: Mapping[str, Any], given: Any, own: tuple[str, ...]) -> dict[str, Any]:
    given = given if isinstance(given, Mapping) else {}
    fields = {
        key: _joined(value, given.get(key), own) if isinstance(value, Mapping) else value
        for key, value in base.items()
        if key not in own
    }
    return fields | {key: given[key] for key in own if key in given}


def base_of(folder: StageFolder, config: Mapping[str, Any]) -> StageFolder:
    """Returns the base of a stored LoRA.

    Raises:
      UserError: it is not there any more.
    """
    base = StageFolder((folder.path.resolve().parent / config["init_from"]).resolve(), folder.stage)
    if not base.exists():
        raise UserError(
            f"{folder.path} is a LoRA of stage {folder.stage} of {base.root}, which is not there: put it back, or set "
            f"init_from in {folder.path}/config.json to where it is (from {folder.root})"
        )
    return base


def strangers(base: StageFolder, folder: StageFolder) -> set[str]:
    """Returns the stages of a base's system that were trained with other CLIP embeddings than the run's system has.

    A CLIP that is tuned is another one, to which the other stages are still to be tuned.
    """
    home = next((root for root in (folder.root, base.root) if StageFolder(root, "clip").exists()), base.root)
    ours = None if folder.stage == "clip" else StageFolder(home, "clip").read_json("contract.json")
    names = [path.parent.name for path in base.root.glob("*/contract.json")]
    return {name for name in names if StageFolder(base.root, name).read_json("contract.json") != ours}


def check_fingerprint(folder: StageFolder, base: StageFolder, weights: str) -> None:
    """Raises UserError unless a LoRA was trained on weights of this fingerprint."""
    stored = folder.read_json("base.json")
    if stored is None or stored["weights"] != weights:
        raise UserError(
            f"{folder.path} is a LoRA of other weights ({stored and stored['weights']}) than those now in "
            f"{base.path} ({weights}): put those back, or train it again in another --workdir"
        )


def check_contract(base: StageFolder, clip: StageFolder) -> None:
    """Checks that a base was trained with the CLIP it is to be tuned with, or with one that this was tuned from.

    Raises:
      UserError: naming both contracts, and what to do.
    """
    theirs, ours = base.read_json("contract.json"), clip.read_json("contract.json")
    if theirs is None or ours is None:
        return
    origin = (clip.read_json("base.json") or {}).get("weights")
    known = {**theirs, "clip": ours["clip"]} if theirs["clip"] == origin else theirs
    differing = [f"{key} {known.get(key)!r} against {ours.get(key)!r}" for key in ours if known.get(key) != ours[key]]
    if differing:
        raise UserError(
            f"config.init_from: {base.path} was trained with other CLIP embeddings than those of {clip.path} "
            f"({', '.join(differing)}): use a --workdir without a clip, or with that one"
        )
