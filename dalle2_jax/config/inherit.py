"""Fine-tuning: a run that starts from the averaged weights of the same stage of another system, the base.

``init_from`` names the system of the base. The architecture and the prediction target come from the base's experiment,
and override those of the run's config; how the network is computed and trained is the run's own (`OWN`). The combined
experiment is stored, so that only a LoRA needs its base afterwards, and a distilled stage until it is trained.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any, cast

from dalle2_jax import pretrained
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.parse import Place, expand_file
from dalle2_jax.config.sections import DecoderConditioning, UpsamplerConditioning
from dalle2_jax.config.stored import stored_experiment
from dalle2_jax.errors import ConfigError, UserError
from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.stages import EmbeddingContract, images
from dalle2_jax.workdir.folder import StageFolder

OWN = {
    # a section that comes from the base: its fields that stay the run's own, at any depth
    "model": ("dtype", "remat", "dropout"),
    "text": (),
    "embedding": (),
    "preprocessing": (),
    "objective": ("chunks",),
    "conditioning": (
        *("drop_image", "drop_text", "crop_fraction"),
        *("blur_sigma", "blur_rate", "degradation", "sample_noise"),
    ),
    "diffusion": ("weighting", "max_weight", "gamma", "k", "timesteps"),
}
"""All other sections are the run's own: data, optim, mesh, sampling, teacher, lora. The loss is the base's."""

_MAX_BASES = 16
"""Maximum number of LoRAs in a chain, each the base of the one before."""


def inherited(run: Experiment, base: Experiment) -> Experiment:
    """Returns the run's experiment with the sections and fields of the base that define the network.

    Args:
      run: the experiment of the run.
      base: the experiment of the same stage of another system.

    Raises:
      ConfigError: fields of the run that do not fit the base.
    """
    if run.stage != base.stage:
        raise ConfigError(f"config.init_from: stage {run.stage} cannot start from a stage {base.stage}", "init_from")
    sections = {}
    for name, own in OWN.items():
        if name in run.spec.sections:
            with Place("config", name).errors():
                sections[name] = _joined(getattr(base.spec, name), getattr(run.spec, name), own)
    conditioning = cast(Any, run.spec).conditioning if "conditioning" in run.spec.sections else None
    if isinstance(conditioning, DecoderConditioning | UpsamplerConditioning) and conditioning.inpaint:
        sections |= _with_known_pixels(run, sections)
    return dataclasses.replace(run, spec=dataclasses.replace(cast(Any, run.spec), **sections))


def _with_known_pixels(run: Experiment, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sections of an inpainting network, given those of its base, which may have no known pixels.

    Raises:
      ConfigError: the run trains a LoRA, which cannot change the input channels of its base.
    """
    model, conditioning = sections["model"], sections["conditioning"]
    if conditioning.inpaint:
        return {}
    if run.lora is not None:
        message = "config.conditioning.inpaint adds input channels, and a LoRA has those of its base: leave out lora"
        raise ConfigError(message, "conditioning.inpaint")
    unet = model.unet if isinstance(model, DecoderConfig) else model
    others = int(isinstance(conditioning, UpsamplerConditioning))
    channels = unet.in_channels + images.image_channels(unet.in_channels, False, others) + 1
    wider = dataclasses.replace(unet, in_channels=channels)
    model = dataclasses.replace(model, unet=wider) if isinstance(model, DecoderConfig) else wider
    return {"model": model, "conditioning": dataclasses.replace(conditioning, inpaint=True)}


def _joined(base: Any, run: Any, own: tuple[str, ...]) -> Any:
    """Returns a section of the base with its ``own`` fields as in the run's section, or their defaults."""
    if not dataclasses.is_dataclass(base):
        return base
    given = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)} if _is_section(run) else {}
    values = {}
    for field in dataclasses.fields(base):
        if field.name in own:
            values[field.name] = given[field.name] if field.name in given else field.default
        else:
            values[field.name] = _joined(getattr(base, field.name), given.get(field.name), own)
    return dataclasses.replace(cast(Any, base), **values)


def _is_section(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def with_base(run: Experiment, root: pathlib.Path) -> tuple[Experiment, StageFolder | None]:
    """Returns the experiment that a run is built from and stores, and the stage that it starts from, if any.

    Once the run has a checkpoint, its own stored experiment takes the place of the base's, and the base may be gone.

    Args:
      run: as the user gives it; ``init_from`` is a path from the current folder, or the name of a system that comes
        with the package.
      root: the run's workdir. The returned experiment's ``init_from`` is the path from there, or that name.

    Raises:
      UserError: there is no such system, it lacks the stage, or it is the run's own.
    """
    if run.init_from is None:
        return run, None
    folder, base = StageFolder(root, run.stage), StageFolder(pretrained.find_system(run.init_from), run.stage)
    if base.root.resolve() == root.resolve():
        raise UserError(f"config.init_from {base.root} is the workdir itself: give another --workdir")
    stored = (stored_experiment(folder) if resumes(folder, base) else None) or _experiment_of(base)
    path = pretrained.name_of(base.root) or os.path.relpath(base.root.resolve(), root.resolve())
    return dataclasses.replace(inherited(run, stored), init_from=path), base


def resumes(folder: StageFolder, base: StageFolder | None) -> bool:
    """Whether a run has a checkpoint of its own; a link to the base's stage is none."""
    return folder.latest_step() is not None and not (base and folder.is_link_to(base))


def _experiment_of(base: StageFolder) -> Experiment:
    if not base.root.is_dir():
        raise UserError(f"config.init_from: there is no system at {base.root}")
    stored = stored_experiment(base)
    if stored is None:
        found = sorted(path.name for path in base.root.iterdir() if StageFolder(base.root, path.name).exists())
        listed = ", ".join(found) or "none"
        raise UserError(f"config.init_from: system {base.root} has no stage {base.stage}, only {listed}")
    return stored


def base_of(folder: StageFolder, init_from: str | None) -> StageFolder:
    """Returns the base of a stored LoRA, or the teacher of a stored stage.

    Nothing but a stage is read there, and its weights must be those that were trained on (`check_fingerprint`).

    Args:
      folder: of the LoRA or the distilled stage.
      init_from: the system of the base, relative to the system of ``folder``.

    Raises:
      UserError: it is not there any more, its path is absolute or a URL, or it leads back here.
    """
    base, seen = _next_base(folder, init_from), {folder.path.resolve()}
    following = base
    while following.exists():
        if following.path.resolve() in seen or len(seen) > _MAX_BASES:
            raise UserError(f"{folder.path} is a LoRA or a student whose base leads back to itself: {following.path}")
        seen.add(following.path.resolve())
        stored = stored_experiment(following)
        if stored is None or stored.lora is None:
            break
        following = _next_base(following, stored.init_from)
    if not base.exists():
        raise UserError(
            f"{folder.path} needs stage {folder.stage} of {base.root}, as the base of a LoRA or as the teacher, and it "
            f"is not there: put it back, or set init_from in {folder.path}/{folder.experiment_file()} to where it is "
            f"(from {folder.root})"
        )
    return base


def _next_base(folder: StageFolder, path: str | None) -> StageFolder:
    """Returns the folder that a stored ``init_from`` leads to."""
    if not path or "\0" in path or "://" in path or os.path.isabs(path):
        raise UserError(
            f"init_from in {folder.path}/{folder.experiment_file()} must be the path of a system relative to "
            f"{folder.root}, not {path!r}"
        )
    root = (folder.path.resolve().parent / path).resolve()
    included = None if root.is_dir() else pretrained.included(path)
    return StageFolder(included or root, folder.stage)


def stored_contract(folder: StageFolder) -> EmbeddingContract | None:
    """Returns the embedding contract in a stage's folder, or None if there is none. UserError if it is damaged."""
    content = folder.read_json("contract.json")
    return None if content is None else expand_file(EmbeddingContract, content, folder.path / "contract.json")


def incompatible_stages(base: StageFolder, folder: StageFolder) -> set[str]:
    """Returns the stages of a base's system that were trained with other CLIP embeddings than the run's system has.

    A fine-tuned CLIP is another CLIP: the other stages must be fine-tuned to it before they fit.
    """
    home = next((root for root in (folder.root, base.root) if StageFolder(root, "clip").exists()), base.root)
    ours = None if folder.stage == "clip" else stored_contract(StageFolder(home, "clip"))
    names = [path.parent.name for path in base.root.glob("*/contract.json")]
    return {name for name in names if stored_contract(StageFolder(base.root, name)) != ours}


def check_fingerprint(folder: StageFolder, base: StageFolder, weights: str) -> None:
    """Raises UserError unless ``weights`` is the fingerprint of the base that a LoRA or a student was trained with."""
    trained_on = (folder.read_json("base.json") or {}).get("weights")
    if trained_on != weights:
        raise UserError(
            f"{folder.path} was trained, as a LoRA or a student, from other weights ({trained_on}) than those now in "
            f"{base.path} ({weights}): put those back, or train it again in another --workdir"
        )


def check_contract(base: StageFolder, clip: StageFolder) -> None:
    """Checks that a base was trained with the CLIP it is to be fine-tuned with, or with the one this was tuned from.

    Raises:
      ContractError: with the differences of both contracts.
    """
    theirs, ours = stored_contract(base), stored_contract(clip)
    if theirs is None or ours is None:
        return
    origin = (clip.read_json("base.json") or {}).get("weights")
    if origin == theirs.clip:  # a tuned CLIP preprocesses images in its own way
        theirs = dataclasses.replace(theirs, clip=ours.clip, preprocessing=ours.preprocessing)
    theirs.check(
        ours,
        f"config.init_from: {base.path} was trained with other CLIP embeddings than those of {clip.path}",
        "use a --workdir without a clip, or with that one",
    )
