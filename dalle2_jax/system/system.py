"""`System`: a loaded text-to-image system, from captions and images to images and embeddings."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Unpack, cast

import jax
import numpy as np
from jaxtyping import Float

from dalle2_jax import compilation
from dalle2_jax.errors import UsageError, UserError
from dalle2_jax.pretrained import find_system
from dalle2_jax.pretrained.download import fetch_system
from dalle2_jax.stages import EmbeddingContract
from dalle2_jax.system import generation
from dalle2_jax.system.cascade import PRIORS
from dalle2_jax.system.editing.embedding_edits import EmbeddingEdits
from dalle2_jax.system.editing.image_edits import ImageEdits
from dalle2_jax.system.images import Images
from dalle2_jax.system.inputs import read_captions
from dalle2_jax.system.load import choose_prior, load_system, missing_stage, started_stages, trained_stages
from dalle2_jax.system.options import SampleOptions
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.workdir import digests


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
class System(ImageEdits, EmbeddingEdits):
    """A loaded system. Its methods may be called from several threads.

    Methods that generate images take the keyword arguments of `SampleOptions` and return `Images`. Images are given as
    Pillow images, paths, open files or uint8 arrays (`dalle2_jax.system.inputs`).

    Attributes:
      path: the system's folder.
      stages: name -> loaded stage, with its ``step``, ``contract`` and network.
      mesh: the devices that it is loaded on.
    """

    def text2image(
        self, prompts: str | Sequence[str], *, image_emb: str = "prior", **options: Unpack[SampleOptions]
    ) -> Images:
        """Generates ``num`` images for each caption.

        Args:
          prompts: one or several captions; "" is unconditional.
          image_emb: the decoder's image embedding (Ramesh et al. 2022, figure 8): "prior" samples it from the prior,
            "text" takes the caption's text embedding in its place, and "none" conditions the decoder on the caption
            only.
          **options: see `SampleOptions`.
        """
        captions = read_captions(prompts)
        if image_emb == "prior":
            return generation.text2image(self.call("text2image", options, self.embeds_images), captions)
        self._check_conditioning(image_emb)
        call = self.call("text2image", options, inputs={"image_emb": image_emb})
        return generation.decode(call, self.embed_text(captions) if image_emb == "text" else None, captions)

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
        self._check_conditioning("none" if image_emb is None else "prior")
        if image_emb is None:
            if prompts is None:
                raise UsageError("decode needs image_emb, prompts or both")
            return generation.decode(call, None, read_captions(prompts))
        dim = cast(EmbeddingContract, self.contract).dim
        emb = np.atleast_2d(np.asarray(image_emb, np.float32))
        if emb.ndim != 2 or emb.shape[1] != dim or not len(emb) or not np.isfinite(emb).all():
            raise UsageError(f"image_emb must be finite numbers of shape (N, {dim}), got shape {np.shape(image_emb)}")
        captions = [""] * len(emb) if prompts is None else read_captions(prompts)
        if len(captions) != len(emb):
            raise UsageError(f"{len(captions)} prompts are given for {len(emb)} embeddings: give one for each")
        return generation.decode(call, emb, captions)
