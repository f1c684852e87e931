"""Detects the family of a checkpoint by asking the module of each family in turn."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dalle2_jax.errors import UserError, WeightsError, choose, printable
from dalle2_jax.weights.clip import formats
from dalle2_jax.weights.component import Component, Hints, Source
from dalle2_jax.weights.families import glide, guided_diffusion, laion
from dalle2_jax.weights.karlo import diffusers, original, priors
from dalle2_jax.weights.kinds import CLIP_KINDS, FEATURE_KINDS, KINDS
from dalle2_jax.weights.tensors import SAFETENSORS_SUFFIX, TORCH_SUFFIXES
from dalle2_jax.workdir import digests

Detector = Callable[[Source], list[Component]]

DETECTORS: Mapping[str, tuple[Detector, ...]] = {
    "karlo": (diffusers.detect, original.detect),
    "kandinsky": (priors.detect,),
    "eclipse": (priors.detect,),
    "laion": (laion.detect,),
    "glide": (glide.detect,),
    "adm": (guided_diffusion.detect,),
    **{kind: (partial(formats.detect, kind=kind),) for kind in CLIP_KINDS},
}
"""The detectors of each kind in ``kinds.KINDS``."""

_ALL = (
    *(diffusers.detect, original.detect, priors.detect, laion.detect, glide.detect, guided_diffusion.detect),
    formats.detect,
)
"""The detectors of kind "auto", in the order in which they are tried."""

_DEPTH = 3
"""Number of parent folders that are searched for digests: exports have files two folders deep."""


class Found(NamedTuple):
    """Result of a detection.

    Attributes:
        components: the components that were found.
        unknown: weights files in the folder in which nothing was found.
    """

    components: list[Component]
    unknown: list[Path]


def detect(path: Path, kind: str = "auto", hints: Hints = Hints()) -> Found:
    """Returns the components of a file or folder. A folder of no known layout is searched file by file.

    Args:
        path: the file or folder.
        kind: one of ``kinds.KINDS``, or "auto".
        hints: what the user knows about the checkpoint.

    Raises:
        WeightsError: nothing was found, or a checkpoint is damaged or of an unsupported architecture.
        UsageError: an unknown kind.
    """
    detectors = _ALL if kind == "auto" else choose("kind of weights", kind, {"auto": _ALL, **DETECTORS})
    _check_digests(path)
    found = _detect(detectors, Source.open(path, hints))
    unknown: list[Path] = []
    if not found and path.is_dir():
        for file in sorted(each for each in path.iterdir() if each.suffix in (SAFETENSORS_SUFFIX, *TORCH_SUFFIXES)):
            parts = _detect(detectors, Source.open(file, hints))
            found += parts
            unknown += [] if parts else [file]
    if not found:
        what = "not a checkpoint of a known family" if kind == "auto" else f"not a checkpoint of kind {kind}"
        raise WeightsError(f"{path} is {what} (known kinds: {', '.join((*KINDS, *FEATURE_KINDS))})", path)
    return Found(found, unknown)


def _check_digests(path: Path) -> None:
    """Compares a folder that was exported here, or a file or subfolder of one, with the digests in it.

    Raises:
        WeightsError: it is damaged.
    """
    folders = [path, *path.absolute().parents[:_DEPTH]]
    folder = next((each for each in folders if (each / digests.NAME).is_file()), None)
    if folder is None or not digests.verifying():
        return
    try:
        if folder == path:
            digests.check(folder)
        elif changed := digests.changed(folder, path.absolute().relative_to(folder).as_posix()):
            raise digests.Damaged(f"{changed[0]} has changed since it was written")
    except digests.Damaged as damage:
        raise WeightsError(
            f"{folder} is damaged ({damage}): export it again; if it was edited, remove {folder / digests.NAME}", folder
        ) from damage


def _detect(detectors: tuple[Detector, ...], source: Source) -> list[Component]:
    """Returns the components of the first detector that finds any; [] if none does.

    Raises:
        WeightsError: as the detectors, and for shapes that no network of the detected family has.
    """
    try:
        return next(filter(None, (each(source) for each in detectors)), [])
    except UserError as error:
        if str(source.path) in str(error):
            raise
        raise WeightsError(f"{source.path}: {error}", source.path) from error
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        reason = printable(f"{type(error).__name__}: {error}")[:200]
        raise WeightsError(
            f"{source.path} has tensors of shapes that no supported network has ({reason})", source.path
        ) from error
