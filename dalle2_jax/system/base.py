"""`SystemBase`: the stages of a loaded system, their embeddings, and the calls that its methods make of them."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax
import numpy as np
from jaxtyping import Float32

from dalle2_jax.errors import UsageError, UserError, shown
from dalle2_jax.stages import EmbeddingContract
from dalle2_jax.system.cascade import PRIORS, Request
from dalle2_jax.system.embedder import ClipEmbedder
from dalle2_jax.system.generation import IMAGE_STAGES, NO_IMAGE_EMB, Call, Generator, clip_input
from dalle2_jax.system.inputs import ImagesLike, InputImage, read_captions, read_images
from dalle2_jax.system.load import choose_prior, missing_stage
from dalle2_jax.system.loaded_stage import LoadedStage
from dalle2_jax.system.options import SampleOptions, make_options
from dalle2_jax.training.sharding import batch_sharding
from dalle2_jax.workdir.folder import StageFolder

EMBEDDED = 64
"""Images or captions that CLIP embeds at a time."""

IMAGE_EMB = ("prior", "text", "none")
"""Sources of the decoder's image embedding of a caption: the prior, the text embedding in its place, or none."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SystemBase:
    """The loaded stages of a system.

    Attributes:
      path: the system's folder.
      stages: name -> loaded stage, with its ``step``, ``contract`` and network.
      mesh: the devices that it is loaded on.
    """

    path: Path
    stages: Mapping[str, LoadedStage]
    mesh: jax.sharding.Mesh

    def __repr__(self) -> str:
        steps = ", ".join(f"{name} (step {member.step:,})" for name, member in self.stages.items())
        contract = self.contract
        space = "no CLIP" if contract is None else f"CLIP {contract.clip}, {contract.dim} dimensions"
        return f"System({str(self.path)!r}: {steps},\n  embedding contract: {space}; devices: {self.mesh.size})"

    @property
    def contract(self) -> EmbeddingContract | None:
        """The embedding contract that all stages share; None for a system without CLIP."""
        return self.stages["clip"].contract if "clip" in self.stages else None

    def embed_image(self, images: ImagesLike) -> Float32[np.ndarray, "N E"]:
        """Returns the CLIP image embeddings of one or several images, in the embedding contract's space."""
        return self._embed_inputs(read_images(images))

    def embed_text(self, texts: str | Sequence[str]) -> Float32[np.ndarray, "N E"]:
        """Returns the CLIP text embeddings of one or several captions, in the embedding contract's space."""
        clip, captions = self._stage("clip"), read_captions(texts)
        if clip.tokenizer is None:
            raise UserError("this system's clip was imported without a tokenizer: import it again with --tokenizer")
        tokens, mask = clip.tokenizer.encode(captions, clip.context_length)
        size = self._embedder.batch_size
        chunks = zip(_chunks(tokens, size), _chunks(mask, size), strict=True)
        return np.concatenate([self._embedder.captions(*chunk)["text_emb"] for chunk in chunks])

    def prior(self, prompts: str | Sequence[str], **options: Unpack[SampleOptions]) -> Float32[np.ndarray, "M E"]:
        """Samples image embeddings from the prior alone.

        Args:
          prompts: one or several captions.
          **options: see `SampleOptions`; ``num`` is 1 by default.

        Returns:
          ``num`` embeddings for each caption, in order, in the embedding contract's space.
        """
        captions = read_captions(prompts)
        names = ("clip", self._prior_name)
        selected = make_options(options, num=1)
        call = Call("prior", self.path, {name: self._stage(name) for name in names}, self.mesh, selected)
        return Generator(call).sample_embeddings(call.requests(captions), call.options.batch_size)

    @property
    def embeds_images(self) -> bool:
        """Whether the decoder reads an image embedding."""
        return "image_emb" in self._stage("decoder").stage.inputs

    def call(
        self,
        command: str,
        options: SampleOptions,
        uses_prior: bool = False,
        inputs: Mapping[str, Any] | None = None,
        **defaults: Any,
    ) -> Call:
        """Returns a call of the stages that generate images, and of the prior if it uses one."""
        names = {"decoder", *(name for name in IMAGE_STAGES if name in self.stages)}
        if "clip" in self.stages or self.embeds_images:
            names.add("clip")
        if uses_prior:
            names.add(self._prior_name)
        used = {name: self._stage(name) for name in (*self.stages, *names) if name in names}
        return Call(command, self.path, used, self.mesh, make_options(options, **defaults), inputs or {})

    # --- inside ---------------------------------------------------------------------------------

    @functools.cached_property
    def _embedder(self) -> ClipEmbedder:
        return ClipEmbedder(self._stage("clip"), batch_sharding(self.mesh), EMBEDDED)

    @property
    def _prior_name(self) -> str:
        return next((name for name in PRIORS.values() if name in self.stages), choose_prior(self.path))

    def _stage(self, name: str) -> LoadedStage:
        """Returns a loaded stage. UserError if there is none."""
        if name in self.stages:
            return self.stages[name]
        if StageFolder(self.path, name).latest_step() is not None:
            raise UserError(f"stage {name} of {self.path} is not loaded: load the system with it (stages=...)")
        raise UserError(missing_stage(self.path, name))

    def _check_conditioning(self, image_emb: str = "prior") -> None:
        """Checks that the decoder can be conditioned on an image embedding, or for "none" on a caption alone.

        Raises:
          UsageError: ``image_emb`` is none of `IMAGE_EMB`.
          UserError: the decoder reads no image embedding, or no caption.
        """
        if image_emb not in IMAGE_EMB:
            raise UsageError(f"image_emb must be one of {', '.join(IMAGE_EMB)}, got {shown(image_emb)}")
        if not self.embeds_images:
            raise UserError(NO_IMAGE_EMB)
        if image_emb == "none" and "tokens" not in self._stage("decoder").stage.inputs:
            raise UserError("this system's decoder reads no caption: it needs an image embedding")

    def _embed_inputs(self, inputs: Sequence[InputImage]) -> Float32[np.ndarray, "N E"]:
        """Returns the CLIP embeddings of images that are read already."""
        chunks = _chunks(clip_input(self._stage("clip"), inputs), self._embedder.batch_size)
        return np.concatenate([self._embedder.images(chunk) for chunk in chunks])

    def _embed_captions(
        self, generator: Generator, captions: Sequence[str], image_emb: str
    ) -> Float32[np.ndarray, "N E"]:
        """Returns an image embedding for each caption: one sample of the prior, or with "text" its text embedding."""
        if image_emb == "text":
            return self.embed_text(captions)
        requests = [Request(caption, index, 0) for index, caption in enumerate(captions)]
        return generator.sample_embeddings(requests, generator.call.options.batch_size)


def read_caption(text: Any) -> str:
    """Returns a caption. UsageError unless it is one."""
    if not isinstance(text, str):
        raise UsageError(f"a caption must be a str, not {shown(text)}")
    return read_captions(text)[0]


def _chunks(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
