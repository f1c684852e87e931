"""The spec of CLIP, and the one table from the name of a stage to its spec."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from dalle2_jax.config.image_specs import DecoderSpec, UpsamplerSpec
from dalle2_jax.config.parse import expand
from dalle2_jax.config.prior_specs import ArPriorSpec, PriorSpec
from dalle2_jax.config.sections import (
    TokenizerConfig,
)
from dalle2_jax.config.spec import (
    TOWER_SIZES,
    Config,
    DiffusedSpec,
    optional,
    parse_tower,
    with_sizes,
    without,
)
from dalle2_jax.models.clip import ClipConfig
from dalle2_jax.stages import ClipStage, ContrastiveConfig, EmbeddingConfig
from dalle2_jax.types import Preprocessing


@dataclasses.dataclass(frozen=True)
class ClipSpec:
    """CLIP: sections model, text, embedding and preprocessing. See `Spec`.

    Attributes:
      preprocessing: how images of any size become CLIP's input; None for a CLIP that is trained here, whose images
        have the ``resolution`` of the data.
      resolution: of the images in the section ``data``.
      objective: the loss.
    """

    model: ClipConfig
    text: TokenizerConfig
    embedding: EmbeddingConfig = EmbeddingConfig()
    preprocessing: Preprocessing | None = None
    resolution: int | None = None
    objective: ContrastiveConfig = ContrastiveConfig()

    sections: ClassVar[Mapping[str, bool]] = {
        **{"model": True, "text": True},
        **{"embedding": False, "preprocessing": False, "objective": False},
    }
    derived: ClassVar[tuple[str, ...]] = TOWER_SIZES
    distilled: ClassVar[bool] = False

    @classmethod
    def parse(cls, config: Config, resolution: int | None) -> "ClipSpec":
        """See `Spec.parse`."""
        text = expand(TokenizerConfig, config["text"], "text")
        tower = parse_tower(config["model"].get("text", {}), text)
        model = expand(ClipConfig, without(config["model"], "text"), "model", text=tower)
        embedding = optional(EmbeddingConfig, config, "embedding") or EmbeddingConfig()
        objective = optional(ContrastiveConfig, config, "objective") or ContrastiveConfig()
        return cls(model, text, embedding, optional(Preprocessing, config, "preprocessing"), resolution, objective)

    @property
    def requires(self) -> tuple[str, ...]:
        """CLIP requires no other stage."""
        return ()

    @property
    def reads_text(self) -> bool:
        """CLIP always has a tokenizer."""
        return True

    @property
    def images(self) -> Preprocessing:
        """How images of any size become CLIP's input."""
        return self.preprocessing or Preprocessing(size=self.resolution)

    @property
    def image_size(self) -> int | None:
        """Side of the images that the image tower reads; None without one."""
        return self.model.vision.image_size if self.model.vision else None

    def build(self, vocab_size: int | None, clip: ClipStage | None) -> ClipStage:
        """See `Spec.build`."""
        model = with_sizes(self.model, text=dataclasses.replace(self.model.text, vocab_size=vocab_size))
        return ClipStage(model, self.embedding, self.images, objective=self.objective)

    def check_steps(self) -> None:
        """CLIP is not sampled."""


SPECS: Mapping[str, type] = {
    "clip": ClipSpec,
    "prior": PriorSpec,
    "ar_prior": ArPriorSpec,
    "decoder": DecoderSpec,
    "upsampler_1": UpsamplerSpec,
    "upsampler_2": UpsamplerSpec,
}
"""Kind of each stage of a system, by its name."""

STAGES = tuple(SPECS)
"""Names of all stages, in the order in which they are trained and loaded."""

DIFFUSED = tuple(name for name, spec in SPECS.items() if issubclass(spec, DiffusedSpec))
"""Names of the stages that have a noise schedule."""
