"""`System`: a loaded text-to-image system, from captions and images to images and embeddings."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, cast

import jax
import numpy as np
from jaxtyping import Float, Float32

from dalle2_jax import compilation
from dalle2_jax.errors import UsageError, UserError, shown
from dalle2_jax.pretrained import find_system
from dalle2_jax.pretrained.download import fetch_system
from dalle2_jax.ranges import Range
from dalle2_jax.stages import EmbeddingContract
from dalle2_jax.system import editing
from dalle2_jax.system.cascade import PRIORS
from dalle2_jax.system.embedder import ClipEmbedder
from dalle2_jax.system.generation import IMAGE_STAGES, Call, Generator, clip_input
from dalle2_jax.system.images import Images
from dalle2_jax.system.inputs import ImageLike, ImagesLike, read_captions, read_image, read_images, read_mask
from dalle2_jax.system.load import choose_prior, load_system, missing_stage, started_stages, trained_stages
from dalle2_jax.system.loaded_stage import LoadedStage
from dalle2_jax.system.options import SampleOptions, check_fraction, check_number, make_options
from dalle2_jax.training.sharding import MeshConfig, batch_sharding, make_mesh
from dalle2_jax.workdir import digests
from dalle2_jax.workdir.folder import StageFolder

EMBEDDED = 64
"""Images or captions that CLIP embeds at a time."""

MAX_FRAMES = 1_000


def load(
    path: str | os.PathLike[str],
    *,
    stages: Sequence[str] | None = None,
    prior: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    verify: bool = True,
) -> "System":
    """Loads a trained system, and stores compiled programs on disk from here on.

    Args:
      path: the system's folder, such as "runs/demo", or the name of a system that comes with the package, such as
        "shapes"; "~" is the home folder. A folder with a system takes precedence over such a name. Or the URL of a
        packed system, which is downloaded once into the user's cache.
      stages: names of the stages to load; None loads every trained stage, of two priors one.
      prior: "diffusion" or "ar", where the system has both; None prefers "diffusion".
      mesh: the devices; None takes all of them.
      verify: whether files are compared with their digests, which detect damage on disk.

    Raises:
      UserError: there is no such system, a stage cannot be loaded, or two stages do not share an embedding space.

    Warns:
      SystemWarning: a stage is unfinished, or files of it were changed.
    """
    root = find_system(path) if "://" not in os.fspath(path) else fetch_system(os.fspath(path))
    compilation.enable_compilation_cache()
    if stages is None:
        chosen = choose_prior(root, prior)
        started = [name for name in started_stages(root) if name not in PRIORS.values() or name == chosen]
        stages = trained_stages(root, started)
        if started and not stages:
            raise UserError(missing_stage(root, started[0]))
    with digests.unverified(not verify):
        mesh = make_mesh(MeshConfig()) if mesh is None else mesh
        return System(root, load_system(root, mesh, tuple(stages), allow_unfinished=True), mesh)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class System:
    """A loaded system. Its methods may be called from several threads.

    Methods that generate images take the keyword arguments of `SampleOptions` and return `Images`. Images are given as
    Pillow images, paths, open files or uint8 arrays (`dalle2_jax.system.inputs`).

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

    def text2image(self, prompts: str | Sequence[str], **options: Unpack[SampleOptions]) -> Images:
        """Generates ``num`` images for each caption.

        Args:
          prompts: one or several captions; "" is unconditional.
          **options: see `SampleOptions`.
        """
        captions = read_captions(prompts)
        return editing.text2image(self.call("text2image", options, self.embeds_images), captions)

    def variations(
        self,
        images: ImagesLike,
        prompt: str = "",
        *,
        eta: float | None = None,
        whole_inversion: bool = False,
        **options: Unpack[SampleOptions],
    ) -> Images:
        """Generates images that have the CLIP embedding of given ones (Ramesh et al. 2022, section 3.1).

        Args:
          images: one or several images.
          prompt: a caption, for decoders that read one.
          eta: None starts from fresh noise. Else from the noise that DDIM inversion finds: 0 reconstructs the image,
            and variations differ more from it up to 1.
          whole_inversion: whether the last step, to pure noise, is inverted too; reconstructions are better without it.
          **options: see `SampleOptions`.
        """
        if eta is not None:
            check_fraction("eta", eta)
        given = read_images(images)
        inputs = {"image": [image.name for image in given], "eta": eta, "whole_inversion": whole_inversion}
        call = self.call("variations", options, inputs=inputs)
        return editing.variations(call, given, _caption(prompt), eta, whole_inversion)

    def reconstruct(
        self,
        images: ImagesLike,
        prompt: str = "",
        *,
        steps: int | str | None = None,
        whole_inversion: bool = False,
        **options: Unpack[SampleOptions],
    ) -> Images:
        """Generates images again from their CLIP embedding and the noise that DDIM inversion finds.

        Args:
          images: one or several images.
          prompt: a caption, for decoders that read one.
          steps: DDIM steps of the inversion and of the decoder; None is the decoder's own number.
          whole_inversion: as in `variations`.
          **options: see `SampleOptions`; ``num`` is 1 by default.
        """
        if steps is not None:
            options["decoder"] = {**options.get("decoder", {}), "steps": steps}
        given = read_images(images)
        inputs = {"image": [image.name for image in given], "whole_inversion": whole_inversion}
        call = self.call("reconstruct", options, inputs=inputs, num=1)
        return editing.variations(call, given, _caption(prompt), 0.0, whole_inversion)

    def inpaint(
        self,
        image: ImageLike,
        mask: ImageLike,
        prompt: str | None = None,
        *,
        resample: tuple[int, int] | None = None,
        **options: Unpack[SampleOptions],
    ) -> Images:
        """Regenerates a part of an image.

        Args:
          image: the image; its central square is used.
          mask: an image of the same size, or a bool array [H, W]: white, or True, where the image is regenerated.
          prompt: what to generate; None takes the image's own CLIP embedding in place of a caption's.
          resample: (jump, times) of RePaint: every stretch of ``jump`` steps is taken ``times`` times, which fits the
            new part better to the old.
          **options: see `SampleOptions`.
        """
        given = read_image(image)
        regenerated = read_mask(mask, given)
        mask_name = str(mask) if isinstance(mask, str | os.PathLike) else "given in memory"
        inputs = {"image": given.name, "mask": mask_name, "resample": resample and list(resample)}
        call = self.call("inpaint", options, prompt is not None and self.embeds_images, inputs)
        return editing.inpaint(call, given, regenerated, None if prompt is None else _caption(prompt), resample)

    def interpolate(
        self,
        images: list[ImageLike] | tuple[ImageLike, ImageLike],
        *,
        frames: int = 8,
        eta: float | None = None,
        prompt: str = "",
        whole_inversion: bool = False,
        **options: Unpack[SampleOptions],
    ) -> Images:
        """Generates the images between two, by spherical interpolation of their CLIP embeddings (section 3.2).

        Args:
          images: two images.
          frames: images from the first to the second, both included.
          eta: None gives all frames of a sample the same fresh noise. Else the noise of both images is interpolated,
            so that with 0 the first and last frame reconstruct them.
          prompt: a caption, for decoders that read one.
          whole_inversion: as in `variations`.
          **options: see `SampleOptions`; ``num``, by default 1, is the number of sequences.
        """
        check_number("frames", frames, Range(2, MAX_FRAMES))
        if eta is not None:
            check_fraction("eta", eta)
        given = read_images(images)
        if len(given) != 2:
            raise UsageError(f"interpolate takes two images, got {len(given)}")
        inputs = {"image": [image.name for image in given], "frames": frames, "eta": eta}
        inputs |= {"whole_inversion": whole_inversion}
        call = self.call("interpolate", options, inputs=inputs, num=1)
        return editing.interpolate(call, given, frames, _caption(prompt), eta, whole_inversion)

    def text_diff(
        self,
        image: ImageLike,
        before: str,
        after: str,
        *,
        frames: int = 8,
        theta: float = 0.5,
        prompt: str = "",
        whole_inversion: bool = False,
        **options: Unpack[SampleOptions],
    ) -> Images:
        """Changes an image by the difference between two captions (section 3.3).

        The image's CLIP embedding is rotated towards the normalised difference of the text embeddings, with the
        noise that DDIM inversion finds.

        Args:
          image: the image.
          before: a caption of the image.
          after: a caption of what it becomes.
          frames: images, of which the first reconstructs ``image``.
          theta: the rotation of the last frame, as a fraction of the angle to the difference; the paper takes 0.25 to
            0.5.
          prompt: a caption, for decoders that read one.
          whole_inversion: as in `variations`.
          **options: see `SampleOptions`; ``num``, by default 1, is the number of sequences.
        """
        check_number("frames", frames, Range(2, MAX_FRAMES))
        check_fraction("theta", theta)
        given = read_image(image)
        inputs = {"image": given.name, "from": _caption(before), "to": _caption(after), "frames": frames}
        inputs |= {"theta": theta, "whole_inversion": whole_inversion}
        call = self.call("text_diff", options, inputs=inputs, num=1)
        angles = np.linspace(0.0, theta, frames)
        text_emb = self.embed_text([before, after])
        return editing.text_diff(call, given, text_emb, angles, _caption(prompt), whole_inversion)

    def embed_image(self, images: ImagesLike) -> Float32[np.ndarray, "N E"]:
        """Returns the CLIP image embeddings of one or several images, in the embedding contract's space."""
        clip = self._stage("clip")
        pixels = clip_input(clip, read_images(images))
        return np.concatenate([self._embedder.images(chunk) for chunk in _chunks(pixels, self._embedder.batch_size)])

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

    def decode(
        self,
        image_emb: Float[np.ndarray, "N E"] | None,
        prompts: str | Sequence[str] | None = None,
        **options: Unpack[SampleOptions],
    ) -> Images:
        """Generates images from CLIP image embeddings, such as those of `embed_image` or `prior`.

        Args:
          image_emb: in the embedding contract's space; a single embedding [E] is accepted. None conditions the decoder
            on ``prompts`` only (Ramesh et al. 2022, figure 8).
          prompts: a caption for each embedding, for decoders that read one; None is unconditional.
          **options: see `SampleOptions`; ``num`` is 1 by default.

        Raises:
          UsageError: the embeddings are of another shape, or not finite; or neither they nor prompts are given.
        """
        call = self.call("decode", options, num=1)
        if not self.embeds_images:
            raise UserError("this system's decoder reads no image embedding: use text2image or inpaint")
        if image_emb is None:
            if prompts is None:
                raise UsageError("decode needs image_emb, prompts or both")
            return editing.decode(call, None, read_captions(prompts))
        dim = cast(EmbeddingContract, self.contract).dim
        emb = np.atleast_2d(np.asarray(image_emb, np.float32))
        if emb.ndim != 2 or emb.shape[1] != dim or not len(emb) or not np.isfinite(emb).all():
            raise UsageError(f"image_emb must be finite numbers of shape (N, {dim}), got shape {np.shape(image_emb)}")
        captions = [""] * len(emb) if prompts is None else read_captions(prompts)
        if len(captions) != len(emb):
            raise UsageError(f"{len(captions)} prompts are given for {len(emb)} embeddings: give one for each")
        return editing.decode(call, emb, captions)

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
        """Returns a call of the stages that generate images, and of the prior if it uses one: for `system.rows`.

        Args:
          command: the name of the method that is called.
          options: see `SampleOptions`.
          uses_prior: whether image embeddings of captions are sampled.
          inputs: arguments of the call for the provenance.
          **defaults: the method's own defaults of options.
        """
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


def _caption(text: Any) -> str:
    """Returns a caption. UsageError unless it is one."""
    if not isinstance(text, str):
        raise UsageError(f"a caption must be a str, not {shown(text)}")
    return read_captions(text)[0]


def _chunks(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
