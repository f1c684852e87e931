"""`ImageEdits`: methods of `System` that generate given images again, as a whole or in part."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Unpack

from dalle2_jax.system.base import SystemBase, read_caption
from dalle2_jax.system.editing import inpainting
from dalle2_jax.system.editing.frames import decode_each, inverted, inverted_noise
from dalle2_jax.system.generation import Call, Generator
from dalle2_jax.system.images import Images
from dalle2_jax.system.inputs import ImageLike, ImagesLike, InputImage, read_image, read_images, read_mask
from dalle2_jax.system.options import SampleOptions, check_fraction


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ImageEdits(SystemBase):
    """Variations, reconstructions and inpainting of given images."""

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
        return self._generated_again(self._call("variations", options, inputs=inputs), given, prompt, eta)

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
        return self._generated_again(self._call("reconstruct", options, inputs=inputs, num=1), given, prompt, 0.0)

    def inpaint(
        self,
        image: ImageLike,
        mask: ImageLike,
        prompt: str | None = None,
        *,
        resample: tuple[int, int] | None = None,
        image_emb: str = "prior",
        **options: Unpack[SampleOptions],
    ) -> Images:
        """Regenerates a part of an image.

        Args:
          image: the image; its central square is used.
          mask: an image of the same size, or a bool array [H, W]: white, or True, where the image is regenerated.
          prompt: what to generate; None takes the image's own CLIP embedding in place of a caption's.
          resample: (jump, times) of RePaint: every stretch of ``jump`` steps is taken ``times`` times, which fits the
            new part better to the old.
          image_emb: with a prompt, as in `text2image`.
          **options: see `SampleOptions`.
        """
        if image_emb != "prior":
            self._check_conditioning(image_emb)
        given = read_image(image)
        regenerated = read_mask(mask, given)
        mask_name = str(mask) if isinstance(mask, str | os.PathLike) else "given in memory"
        inputs = {"image": given.name, "mask": mask_name, "resample": resample and list(resample)}
        uses_prior = prompt is not None and self._embeds_images and image_emb == "prior"
        call = self._call("inpaint", options, uses_prior, {**inputs, "image_emb": image_emb})
        emb = None
        if prompt is None and self._embeds_images:
            emb = self._embed_inputs([given])
        elif prompt is not None and image_emb == "text":
            emb = self.embed_text(prompt)
        caption = "" if prompt is None else read_caption(prompt)
        condition = inpainting.Conditioning(caption, emb, prompt is not None and image_emb == "none")
        return inpainting.inpaint(call, given, regenerated, condition, resample)

    def _generated_again(self, call: Call, inputs: Sequence[InputImage], prompt: str, eta: float | None) -> Images:
        """Generates images from the embeddings of given ones, from their own noise unless ``eta`` is None."""
        prompt = read_caption(prompt)
        self._check_conditioning()
        call.options.check_count(len(inputs))
        generator, x_T = Generator(inverted(call, eta)), None
        emb = self._embed_inputs(inputs)
        if eta is not None:
            x_T = inverted_noise(generator, inputs, emb, prompt, call.inputs["whole_inversion"])
        names = [image.name.rpartition("/")[2] for image in inputs]
        return decode_each(generator, emb, x_T, prompt, [prompt or name for name in names])
