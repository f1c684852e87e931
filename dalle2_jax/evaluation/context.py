"""`Context`: what measures read, made once, when the first measure needs it: data, samples, embeddings, networks."""

import copy
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float32, UInt8

from dalle2_jax import data
from dalle2_jax.errors import SystemWarning, UserError
from dalle2_jax.evaluation import examples, lpips
from dalle2_jax.evaluation.features import FeatureNetwork
from dalle2_jax.evaluation.features import load as load_network
from dalle2_jax.evaluation.lpips import Lpips
from dalle2_jax.evaluation.options import Options
from dalle2_jax.evaluation.samples import Generate, SampleFolder, at, read_settings
from dalle2_jax.stages import fingerprint
from dalle2_jax.system import load
from dalle2_jax.system import options as system_options
from dalle2_jax.system.cascade import PRIORS, Request
from dalle2_jax.system.generation import IMAGE_STAGES, Call, Generator
from dalle2_jax.system.loaded_stage import LoadedStage
from dalle2_jax.system.system import System
from dalle2_jax.system.system import load as load_system

BATCH_SIZE = 64
"""Images that are generated at a time, unless the user gives another number."""

PRIOR, TEXT, CAPTION = "prior", "text_embedding", "caption"
"""What the decoder is conditioned on: the prior's embedding, the text embedding in its place, or no embedding."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """Distinct examples with their CLIP embeddings.

    Attributes:
      indices: in the data.
      captions: one for each.
      image_emb: float32[N, E], of unit length.
      text_emb: float32[N, E], of unit length.
    """

    indices: Sequence[int]
    captions: Sequence[str]
    image_emb: Float32[np.ndarray, "N E"]
    text_emb: Float32[np.ndarray, "N E"]


class Context:
    """What measures read.

    Args:
      system: with the stages that the measures need.
      options: of the evaluation.
      folder: where samples are stored.

    Attributes:
      split: of the data.
      scale: guidance scale of the decoder; None for the system's own.
      num: the largest number of samples that a measure reads: as many are generated when the first is needed.
      extracted: networks whose features are computed while sampling goes on.
    """

    def __init__(self, system: System, options: Options, folder: Path):
        self.system, self.options, self.folder = system, options, folder
        self.split = options.split or "val"
        self.scale: float | None = None
        self.num = 0
        self.extracted: tuple[FeatureNetwork, ...] = ()
        self._shared: dict[Any, Any] = {}
        self._folders: dict[Any, SampleFolder] = {}

    def at_guidance(self, scale: float) -> "Context":
        """Returns the context of samples with another guidance scale; everything else is shared."""
        other = copy.copy(self)
        other.scale, other._folders = scale, {}
        return other

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Returns the value of a key, made by the first call."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    # --- networks ---------------------------------------------------------------------------------

    @property
    def networks(self) -> tuple[FeatureNetwork, ...]:
        """The feature networks that the user names."""
        return self.once("networks", lambda: tuple(map(_network, self.options.features)))

    @property
    def clip(self) -> System:
        """The system whose CLIP measures how well images and captions agree."""
        return self.once("clip", self._clip)

    def _clip(self) -> System:
        given = self.options.clip
        if isinstance(given, System):
            return given
        found = self.system if given is None else load_system(given, stages=("clip",))
        if "clip" not in found.stages:
            raise UserError(
                f"{found.path} has no CLIP to compare images and captions with: name one with --clip SYSTEM"
            )
        return found

    @property
    def clip_network(self) -> FeatureNetwork:
        """The image tower of `clip`."""
        return self.once("clip_network", lambda: load_network(self.clip))

    @property
    def lpips(self) -> Lpips | None:
        """LPIPS, if the user names one."""
        given = self.options.lpips
        return given if given is None or isinstance(given, Lpips) else self.once("lpips", lambda: lpips.load(given))

    # --- data -------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Side of the generated images, in pixels."""
        stages = [self.stage(name).stage for name in IMAGE_STAGES if name in self.system.stages]
        if not stages:
            raise UserError(load.missing_stage(self.system.path, "decoder"))
        return cast(int, stages[-1].image_size)

    def stage(self, name: str) -> Any:
        """Returns a loaded stage. UserError if there is none."""
        if name not in self.system.stages:
            raise UserError(load.missing_stage(self.system.path, name))
        return self.system.stages[name]

    @property
    def source(self) -> data.Source:
        """Captions and images, of the size of samples."""
        return self.once("source", lambda: self.open("decoder", self.split, self.size))

    @property
    def clip_source(self) -> data.Source:
        """Captions and images, of the size that CLIP reads."""
        return self.once("clip_source", lambda: self.open("clip", self.split))

    def open(self, stage: str, split: str, size: int | None = None) -> data.Source:
        """Opens a split of the data.

        Args:
          stage: whose own data are opened if the user names none.
          split: "train", "val" or another.
          size: side of the images; None is that of the stage.
        """
        given = self.options.data
        return examples.open_source(self.system.path, stage, split, given, self.options.trust_system, size)

    @property
    def divided(self) -> bool:
        """Whether the data have splits: those in memory have none."""
        return self.options.data is None or isinstance(self.options.data, str | os.PathLike)

    def indices(self, num: int) -> list[int]:
        """Returns the examples whose captions are sampled: the first of `examples.order`, or those of a protocol."""
        examples.check_count(num, self.source)
        if self.options.protocol is None:
            return list(examples.order(self.source)[:num])
        order = np.random.default_rng(self.options.seed).permutation(len(self.source))
        return order[:num].tolist()

    def real_indices(self, num: int) -> list[int]:
        """Returns the examples whose images are compared with samples: the same ones, or all with a protocol."""
        return self.indices(num) if self.options.protocol is None else list(range(len(self.source)))

    def captions(self, num: int) -> list[str]:
        """Returns the captions of `indices`."""
        return self.once(("captions", num), lambda: examples.captions(self.source, self.indices(num)))

    def embedded(self, num: int) -> Examples:
        """Returns distinct examples with their embeddings by the system's CLIP."""
        return self.once(("embedded", num), lambda: self._embedded(num))

    def _embedded(self, num: int) -> Examples:
        self.stage("clip")
        chosen = examples.distinct(self.clip_source, num)
        captions = examples.captions(self.clip_source, chosen)
        image_emb = examples.embed_images(self.system, self.clip_source, chosen)
        return Examples(chosen, captions, image_emb, unit(self.system.embed_text(captions)))

    # --- samples ----------------------------------------------------------------------------------

    def samples(self, num: int, condition: str = PRIOR) -> SampleFolder:
        """Returns a folder with at least ``num`` images of the captions of the data.

        Args:
          num: of images.
          condition: `PRIOR`, `TEXT` or `CAPTION`.
        """
        total = max(num, self.num) if condition == PRIOR else num
        return self.generated("data", lambda: self.captions(total), condition)

    def generated(self, name: str, captions: Callable[[], Sequence[str]], condition: str = PRIOR) -> SampleFolder:
        """Returns a folder with the images of captions.

        Args:
          name: of the captions.
          captions: returns them; called once.
          condition: `PRIOR`, `TEXT` or `CAPTION`.
        """
        key = (name, condition)
        if key not in self._folders:
            folder, generate = self._open_folder(name, condition, prompts := captions())
            folder.fill(prompts, generate, self.extracted, self.options.progress)
            self._folders[key] = folder
        return self._folders[key]

    @property
    def first_samples(self) -> SampleFolder | None:
        """A folder of samples, for a grid, generated by the prior if there is one; None before any were generated."""
        folders = sorted(self._folders.items(), key=lambda each: each[0][1] != PRIOR)
        return folders[0][1] if folders else None

    def _open_folder(self, name: str, condition: str, captions: Sequence[str]) -> tuple[SampleFolder, Generate]:
        words = [name, *([condition] if condition != PRIOR else [])]
        words += [f"guidance_{self.scale:g}"] if self.scale is not None else []
        path = self.folder / "samples" / "-".join(words)
        stored = at(read_settings(path) or {}, "batch_size")
        size = self.options.batch_size or (stored if isinstance(stored, int) else min(BATCH_SIZE, len(captions)))
        generator = self._generator(size, condition)
        _warn_of_truncation(generator.call.stages, captions)
        settings = {
            "weights": {stage: self._weights(stage) for stage in generator.call.stages},
            "seed": self.options.seed,
            "condition": condition,
            "sampling": {name: dataclasses.asdict(config) for name, config in generator.sampling.items()},
        }
        make: Generate = functools.partial(generate, generator, condition)
        if condition == TEXT:
            # the last batch is padded
            text_emb = np.pad(self.system.embed_text(list(captions)), ((0, size), (0, 0)))
            make = functools.partial(generate, generator, condition, text_emb=text_emb)
        return SampleFolder(path, settings, size, self.size), make

    def _generator(self, batch_size: int, condition: str) -> Generator:
        names = [name for name in ("clip", *IMAGE_STAGES) if name in self.system.stages]
        if "image_emb" in self.stage("decoder").stage.inputs and condition == PRIOR:
            priors = [name for name in PRIORS.values() if name in self.system.stages]
            names += priors[:1] or [load.choose_prior(self.system.path)]
        used = {name: self.stage(name) for name in names}
        settings = {name: dict(fields) for name, fields in self.options.sampling.items()}
        if self.scale is not None:
            settings["decoder"] = {**settings.get("decoder", {}), "guidance": self.scale}
        selected = system_options.make_options({"seed": self.options.seed, "batch_size": batch_size, **settings})
        return Generator(Call("evaluate", self.system.path, used, self.system.mesh, selected))

    def _weights(self, stage: str) -> str:
        """Returns a hash of a stage's weights and the step of its checkpoint."""
        loaded = self.system.stages[stage]
        return self.once(("weights", stage), lambda: f"{fingerprint(loaded.variables.params)} at step {loaded.step}")


def generate(
    generator: Generator,
    condition: str,
    first: int,
    captions: Sequence[str],
    text_emb: Float32[np.ndarray, "N E"] | None = None,
) -> UInt8[np.ndarray, "B H W 3"]:
    """Generates a batch of images.

    Args:
      generator: the cascade.
      condition: `PRIOR`, `TEXT` or `CAPTION`.
      first: number of the first caption, which selects the random key.
      captions: of the images.
      text_emb: for `TEXT`, the embeddings of all captions from number 0 on.
    """
    requests = [Request(caption, first + place, 0) for place, caption in enumerate(captions)]
    if condition == PRIOR:
        sampled = generator.text2image(requests, len(requests))
    else:
        sampled = generator.decode(requests, len(requests), text_emb)
    return np.stack([image for _, image in sampled])


def _warn_of_truncation(stages: Mapping[str, LoadedStage], captions: Sequence[str]) -> None:
    """Warns, once for each stage, of captions that have more tokens than it reads."""
    for name, loaded in stages.items():
        if loaded.tokenizer is not None and name != "clip":
            count = len(list(loaded.tokenizer.truncated(captions, loaded.context_length)))
            if count:
                limit = f"the {name}'s {loaded.context_length} tokens; their ends are not read"
                warnings.warn(
                    f"{count} of {len(captions)} captions are longer than {limit}", SystemWarning, stacklevel=2
                )


def unit(emb: np.ndarray) -> Float32[np.ndarray, "N E"]:
    """Returns embeddings scaled to unit length."""
    return emb / np.maximum(np.linalg.norm(emb, axis=1, keepdims=True), np.float32(1e-12))


def _network(given: Any) -> FeatureNetwork:
    return given if isinstance(given, FeatureNetwork) else load_network(given)
