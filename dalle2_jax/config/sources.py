"""The section ``data`` of a config: which data set a stage is trained on."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dalle2_jax.config.parse import Place, expand, expand_kind
from dalle2_jax.data import configs
from dalle2_jax.errors import DataError, shown
from dalle2_jax.ranges import NonNegativeInt, Side
from dalle2_jax.types import Preprocessing

if TYPE_CHECKING:
    from dalle2_jax.data.sources import Source


@dataclasses.dataclass(frozen=True)
class PythonDataConfig:
    """Data that were given to ``train`` as an object, which only its caller can give again.

    Attributes:
      source: the object's class.
      examples: how many it has.
      resolution: of its images; None where it has none.
    """

    source: str = ""
    examples: NonNegativeInt = 0
    resolution: Side | None = None


KINDS: Mapping[str, type] = {**configs.KINDS, "python": PythonDataConfig}
"""Configs of data sets by the name that a section gives as ``kind``."""

SourceConfig = configs.SourceConfig | PythonDataConfig


def parse_source(section: Any, where: str = "data") -> SourceConfig:
    """Makes the config of a data set; the parts of a mixture have its resolution.

    Raises:
      ConfigError: as `expand_kind`.
    """
    place = Place("config", where)
    if not isinstance(section, Mapping):
        raise place.error(f"must be a section that names data, not {shown(section)}")
    if "kind" in section and section["kind"] == "mixture":
        common = {"resolution": section["resolution"]} if "resolution" in section else {}
        parts = section["parts"] if "parts" in section else {}
        if not isinstance(parts, Mapping):
            raise (place / "parts").error(f"must map names to sections of data, not {shown(parts)}")
        parsed = {
            name: parse_source({**common, **part} if isinstance(part, Mapping) else part, f"{where}.parts.{name}")
            for name, part in parts.items()
        }
        return expand(configs.MixtureConfig, {**_without_kind(section), "parts": parsed}, where)
    return expand_kind(KINDS, section, where)


def _without_kind(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "kind"}


def resolution_of(source: SourceConfig | None) -> int | None:
    """Returns the resolution of a data set's images; None without images."""
    return None if source is None or isinstance(source, configs.EmbeddingsConfig) else source.resolution


def open_source(config: SourceConfig | None, split: str, preprocessing: Preprocessing | None = None) -> "Source":
    """Opens a split of a data set.

    Args:
      config: of the data set; None for a stage that was imported.
      split: "train" or "val".
      preprocessing: how CLIP reads images of any size; None leaves them as the data set makes them.

    Raises:
      DataError: there is no data set to open.
      UserError: it cannot be read.
    """
    from dalle2_jax import data  # with the libraries that read data sets

    if config is None:
        raise DataError("the stage was imported, not trained here, and its config names no data: name a data set")
    if isinstance(config, PythonDataConfig):
        raise DataError(
            f"the stage was trained on data given in Python ({config.source}, {config.examples} examples): give them "
            "again as data=, or name a data set"
        )
    source = data.make_source(config, split)
    return source.preprocessed(preprocessing) if preprocessing else source
