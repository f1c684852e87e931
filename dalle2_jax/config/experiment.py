"""`Experiment`: everything that decides how one stage is built and trained, as one typed, frozen value.

A ConfigDict becomes an `Experiment` before anything else happens; past this package there is no mapping to look a name
up in. A stage's folder stores it as experiment.json, which reads back to an equal value.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from dalle2_jax.config import pages
from dalle2_jax.config.parse import expand, flatten
from dalle2_jax.config.prior_specs import PriorSpec
from dalle2_jax.config.sources import KINDS, SourceConfig, parse_source, resolution_of
from dalle2_jax.config.spec import Spec
from dalle2_jax.config.specs import SPECS, ClipSpec
from dalle2_jax.errors import ConfigError, UsageError, choose, shown
from dalle2_jax.stages import ClipStage, LoraConfig, LoraStage, Stage
from dalle2_jax.training.configs import HOST, OptimConfig, RunConfig
from dalle2_jax.training.sharding import MeshConfig
from dalle2_jax.types import Preprocessing

if TYPE_CHECKING:
    from ml_collections import ConfigDict

RUN_FIELDS = tuple(field.name for field in dataclasses.fields(RunConfig))
TRAINING = ("data", "optim", "mesh")
"""Sections without which a stage can be built, as an imported one is, but not trained."""

_TOP = ("stage", "init_from", *RUN_FIELDS)
_RESUME_CHANGES = "resume_changes"
_WRITTEN_KINDS = {**KINDS, **PriorSpec.KINDS}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The config of one stage.

    Attributes:
      stage: its name, a key of `SPECS`.
      spec: what the stage is: its sections model, text, diffusion, sampling, conditioning, embedding, preprocessing,
        teacher.
      run: how long it is trained, and how often it reports. ``total_steps`` is 0 for an imported stage.
      data: what it is trained on; None for an imported stage, as are the following two.
      optim: the optimizer.
      mesh: the devices.
      lora: the LoRA that is trained in place of the stage's own weights; None trains those.
      init_from: the folder of the system that fine-tuning starts from, relative to the workdir once it is stored.
    """

    stage: str
    spec: Spec
    run: RunConfig = RunConfig()
    data: SourceConfig | None = None
    optim: OptimConfig | None = None
    mesh: MeshConfig | None = None
    lora: LoraConfig | None = None
    init_from: str | None = None

    @classmethod
    def from_config(cls, config: "Mapping[str, Any] | ConfigDict") -> "Experiment":
        """Returns the experiment of a ConfigDict or of nested dicts; the flag `resume_changes` is ignored.

        Raises:
          ConfigError: an unknown stage, section, field or value; the message offers the nearest name.
        """
        from ml_collections import ConfigDict

        return cls.from_json(config.to_dict() if isinstance(config, ConfigDict) else config)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "Experiment":
        """Returns the experiment that `to_json` wrote. ConfigError as `from_config`."""
        stage = _check_sections(config)
        data = parse_source(config["data"]) if "data" in config else None
        init_from = config["init_from"] if "init_from" in config else None
        if init_from is not None and not isinstance(init_from, str):
            raise ConfigError(f"config.init_from must be the folder of a system, not {shown(init_from)}", "init_from")
        return cls(
            stage,
            SPECS[stage].parse(config, resolution_of(data)),
            expand(RunConfig, {key: config[key] for key in RUN_FIELDS if key in config}, ""),
            data,
            expand(OptimConfig, config["optim"], "optim") if "optim" in config else None,
            expand(MeshConfig, config["mesh"], "mesh") if "mesh" in config else None,
            expand(LoraConfig, config["lora"], "lora") if "lora" in config else None,
            init_from or None,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object of experiment.json: the config with every field in it."""
        content: dict[str, Any] = {"stage": self.stage, **flatten(self.run)}
        for name in self.spec.sections:
            _put(content, name, getattr(self.spec, name))
        for name in (*TRAINING, "lora"):
            _put(content, name, getattr(self, name))
        if self.init_from is not None:
            content["init_from"] = self.init_from
        for path in self.spec.derived:
            _remove(content, path.split("."))
        return content

    def build(self, vocab_size: int | None, clip: ClipStage | None) -> Stage:
        """Returns the stage; see `Spec.build`. Of a LoRA, this is the stage that it changes."""
        return self.spec.build(vocab_size, clip)

    def trained(self, stage: Stage) -> Stage:
        """Returns what is trained of a stage that `build` returned: the stage, or a LoRA of it."""
        return stage if self.lora is None else LoraStage(stage, self.lora)

    @property
    def requires(self) -> tuple[str, ...]:
        """Names of the stages that this one cannot be built without."""
        return self.spec.requires

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How a CLIP reads images of any size; None for other stages, which are trained on the data's images."""
        return self.spec.images if isinstance(self.spec, ClipSpec) else None

    @property
    def resolution(self) -> int | None:
        """Side of the images in the section ``data``; None without any."""
        return resolution_of(self.data)

    @property
    def host_memory_fields(self) -> tuple[str, ...]:
        """Dotted names of the fields that keep arrays in the memory of the host."""
        model = self.to_json()["model"]
        section, network = ("model.unet", model["unet"]) if "unet" in model else ("model", model)
        offloaded = (f"{section}.remat",) if network["remat"] == "offload" else ()
        on_host = self.optim is not None and self.optim.ema_memory == HOST
        return (*offloaded, *(("optim.ema_memory",) if on_host else ()))

    def with_data(self, config: SourceConfig) -> "Experiment":
        """Returns the experiment with another data set."""
        spec = self.spec
        if isinstance(spec, ClipSpec):
            spec = dataclasses.replace(spec, resolution=resolution_of(config))
        return dataclasses.replace(self, data=config, spec=spec)

    def check_trainable(self) -> tuple[OptimConfig, MeshConfig]:
        """Returns the sections optim and mesh. ConfigError if something that training needs is missing or wrong."""
        for name, section in (("data", self.data), ("optim", self.optim), ("mesh", self.mesh)):
            if section is None:
                raise ConfigError(f"config of stage {self.stage} needs a section {name}", name)
        if self.run.total_steps < 1:
            raise ConfigError("config.total_steps must be at least 1, got 0", "total_steps")
        if self.lora is not None and self.init_from is None:
            raise ConfigError(
                "config.lora changes a trained stage: name its system, as in --config.init_from=runs/demo", "lora"
            )
        if self.spec.distilled and self.init_from is None:
            raise ConfigError(
                "config.teacher distils a trained stage: name its system, as in --config.init_from=runs/demo", "teacher"
            )
        if self.spec.distilled and self.lora is not None:
            raise ConfigError("config.lora cannot be trained by distillation: leave out lora or teacher", "lora")
        self.spec.check_steps()
        if isinstance(self.spec, ClipSpec) and self.run.batch_size % self.spec.objective.chunks:
            raise ConfigError(
                f"config.objective.chunks {self.spec.objective.chunks} must divide batch_size {self.run.batch_size}",
                "objective.chunks",
            )
        return cast(OptimConfig, self.optim), cast(MeshConfig, self.mesh)


def _put(content: dict[str, Any], name: str, section: Any) -> None:
    if section is not None:
        content[name] = flatten(section, _WRITTEN_KINDS)


def _remove(content: dict[str, Any], path: list[str]) -> None:
    """Removes a field that is there; a part of the path may be null."""
    *sections, field = path
    section: Any = content
    for name in sections:
        section = section[name] if section is not None and name in section else None
    if section is not None and field in section:
        del section[field]


def _check_sections(config: Mapping[str, Any]) -> str:
    """Returns a config's stage. ConfigError for an unknown field at the top, or a section that is none or missing."""
    stage = config["stage"] if "stage" in config else ""
    spec = _choose("stage", stage, SPECS)
    sections = {**spec.sections, **dict.fromkeys((*TRAINING, "lora"), False)}
    for key in config:
        _choose(f"field of stage {stage}'s config", key, dict.fromkeys((*_TOP, _RESUME_CHANGES, *sections)))
    for name, required in sections.items():
        if (required or name in config) and not (name in config and isinstance(config[name], Mapping)):
            raise ConfigError(f"config of stage {stage} needs a section {name}", name)
    return stage


def _choose(what: str, name: Any, options: Mapping[str, Any]) -> Any:
    try:
        return choose(what, name, options)
    except UsageError as error:
        raise ConfigError(str(error), str(name) if what != "stage" else "stage") from error


def resume_changes(config: "Mapping[str, Any] | ConfigDict") -> bool:
    """Returns the flag ``config.resume_changes`` of a command line: it is of the command and is never stored.

    Raises:
      ConfigError: it is neither True nor False.
    """
    value = config[_RESUME_CHANGES] if _RESUME_CHANGES in config else False
    if not isinstance(value, bool):
        raise ConfigError(f"config.{_RESUME_CHANGES} must be True or False, not {shown(value)}", _RESUME_CHANGES)
    return value


def experiment(page: str, **overrides: Any) -> Experiment:
    """Returns the experiment of a config page.

    Args:
      page: FILE:STAGE, as in "configs/shapes.py:decoder".
      **overrides: other values by dotted path, as in ``**{"optim.lr": 1e-4}``; a section may be given as a dict.

    Raises:
      UsageError: the page cannot be read.
      ConfigError: as `Experiment.from_config`.
    """
    from ml_collections import ConfigDict

    config = pages.call_config_page(page)
    if not isinstance(config, ConfigDict):
        raise UsageError(f"get_config of {page} returns {shown(config)} and not a ConfigDict")
    content = config.to_dict()
    for path, value in overrides.items():
        *sections, field = path.split(".")
        section = content
        for depth, name in enumerate(sections):
            where = ".".join(sections[: depth + 1])
            if not isinstance(section.setdefault(name, {}), dict):
                raise ConfigError(f"config.{where} is no section, so there is no config.{path}", path)
            section = section[name]
        section[field] = value
    return Experiment.from_config(content)
