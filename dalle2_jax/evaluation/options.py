"""Options of `evaluate`: the data, the networks, how many examples and how samples are generated."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from dalle2_jax.errors import ConfigError, choose, shown
from dalle2_jax.evaluation.features import FeatureNetwork
from dalle2_jax.evaluation.lpips import Lpips
from dalle2_jax.evaluation.registry import PROTOCOLS
from dalle2_jax.ranges import MAX_INT, Range
from dalle2_jax.system.options import StageSettings, check_number, choose_field
from dalle2_jax.system.system import System

PathLike = str | os.PathLike[str]

MAX_GUIDANCE = 1_000.0


class EvaluateOptions(TypedDict, total=False):
    """Keyword arguments of `evaluate`.

    Attributes:
      data: a path or KIND:PATH, a source, or images and captions in memory as for `train`; None opens the data that the
        system was trained on.
      split: of the data; None is the measure's own, "val" for most.
      num: number of examples; None is the measure's own.
      out: a folder for the samples, their features and the results; an interrupted evaluation continues there. None
        keeps nothing.
      features: the networks whose features are compared: folders, or loaded networks.
      lpips: LPIPS: a folder or a loaded one.
      clip: the system whose CLIP measures ``clip_score`` and ``cmmd``; None takes the evaluated system's own.
      reference: statistics of a data set for ``fd`` (`write_statistics`), in place of the data's images.
      guidance: scale of the decoder; of several, every measure of images is repeated for each.
      protocol: "coco30k".
      label: the field of the data's records that ``zero_shot`` and ``linear_probe`` take as the class.
      templates: captions of a class for ``zero_shot``, with {} in place of its name.
      stage: the stage of ``bits_per_dim`` and ``noise_statistics``.
      sampling: settings of each stage, such as ``{"decoder": {"steps": 20}}``.
      prior: "diffusion" or "ar", where the system has both.
      seed: of samples, noise and resampling.
      batch_size: images that are generated at a time.
      trust_system: whether a path that the system's config names is opened.
      verify: whether checkpoints are compared with their digests, which detect damage on disk.
      progress: whether progress bars are shown.
    """

    data: Any
    split: str | None
    num: int | None
    out: PathLike | None
    features: "PathLike | FeatureNetwork | Sequence[PathLike | FeatureNetwork]"
    lpips: "PathLike | Lpips | None"
    clip: "PathLike | System | None"
    reference: PathLike | None
    guidance: float | Sequence[float] | None
    protocol: str | None
    label: str | None
    templates: Sequence[str]
    stage: str | None
    sampling: Mapping[str, StageSettings]
    prior: str | None
    seed: int
    batch_size: int | None
    trust_system: bool
    verify: bool
    progress: bool


@dataclasses.dataclass(frozen=True)
class Options:
    """`EvaluateOptions` with their defaults.

    Raises:
      ConfigError: a value of the wrong type or out of range.
    """

    data: Any = None
    split: str | None = None
    num: int | None = None
    out: Path | None = None
    features: tuple[Any, ...] = ()
    lpips: Any = None
    clip: Any = None
    reference: Path | None = None
    guidance: tuple[float, ...] = ()
    protocol: str | None = None
    label: str | None = None
    templates: tuple[str, ...] = ()
    stage: str | None = None
    sampling: Mapping[str, StageSettings] = dataclasses.field(default_factory=dict)
    prior: str | None = None
    seed: int = 1
    batch_size: int | None = None
    trust_system: bool = False
    verify: bool = True
    progress: bool = False

    def __post_init__(self) -> None:
        if self.num is not None:
            check_number("num", self.num, Range(1, MAX_INT))
        if self.batch_size is not None:
            check_number("batch_size", self.batch_size, Range(1, 100_000))
        check_number("seed", self.seed, Range(0, MAX_INT))
        for scale in self.guidance:
            if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale <= MAX_GUIDANCE:
                raise ConfigError(f"guidance must be from 0 to {MAX_GUIDANCE:g}, got {shown(scale)}", "guidance")
        if len({*self.guidance}) < len(self.guidance):
            raise ConfigError(f"guidance names a scale twice: {shown(self.guidance)}", "guidance")
        for template in self.templates:
            if not isinstance(template, str) or "{}" not in template:
                raise ConfigError(f"templates must have {{}} for the class, got {shown(template)}", "templates")
        if self.protocol is not None:
            choose("protocol", self.protocol, PROTOCOLS)
        if not isinstance(self.sampling, Mapping):
            raise ConfigError(f"sampling must be a dict of settings by stage, not {shown(self.sampling)}", "sampling")


def make_options(given: Mapping[str, Any]) -> Options:
    """Returns the options of a call.

    Raises:
      ConfigError: an unknown name, with the nearest one, or a value that is not accepted.
    """
    known = {field.name: None for field in dataclasses.fields(Options)}
    for name in given:
        choose_field("option", name, known, name)
    values = dict(given)
    for name in ("features", "guidance", "templates"):
        if name in values:
            values[name] = _several(values[name])
    for name in ("out", "reference"):
        if values.get(name) is not None:
            values[name] = Path(values[name]).expanduser()
    return Options(**values)


def _several(value: Any) -> tuple[Any, ...]:
    """Returns one value, or several, as a tuple; None is none."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)
