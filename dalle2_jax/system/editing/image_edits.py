"""`ImageEdits`: methods of `System` that generate given images again, as a whole or in part."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Unpack

import numpy as np

from dalle2_jax.errors import ConfigError
from dalle2_jax.ranges import Range
from dalle2_jax.system.base import SystemBase, read_caption
from dalle2_jax.system.editing import inpainting
from dalle2_jax.system.editing.components import Components
from dalle2_jax.system.editing.frames import ImageEmb, Noise, decode_each, decode_path, inverted_noise, with_inversion
from dalle2_jax.system.editing.similarity import Distance, describer
from dalle2_jax.system.generation import Call, Generator
from dalle2_jax.system.images import Images
from dalle2_jax.system.inputs import ImageLike, ImagesLike, InputImage, read_image, read_images, read_mask
from dalle2_jax.system.options import SampleOptions, check_fraction, check_number
from dalle2_jax.workdir.folder import StageFolder


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
        call = with_inversion(self.call("variations", options, inputs=inputs), eta)
        prompt = read_caption(prompt)
        generator, emb, x_T = self._encoded(call, given, prompt)
        return decode_each(generator, emb, x_T, prompt, [prompt or image.short_name for image in given])

    def reconstruct(
        self,
        images: ImagesLike,
        prompt: str = "",
        *,
        steps: int | str | None = None,
        components: Sequence[int] = (),
        whole_inversion: bool = False,
        lpips: Distance | None = None,
        **options: Unpack[SampleOptions],
    ) -> Images:
        """Generates images again from their CLIP embedding and the noise that DDIM inversion finds.

        The provenance has the PSNR of each image in dB, as "psnr", to the given one at the size of the result.

        Args:
          images: one or several images.
          prompt: a caption, for decoders that read one.
          steps: DDIM steps of the inversion and of the decoder; None is the decoder's own number.
          components: numbers of principal components. Each image is decoded from the projection of its embedding on
            the first of them, for each number, and from fresh noise that is the same for all (figure 7). They must
            have been measured (``dalle2 evaluate SYSTEM --measures components``).
          whole_inversion: as in `variations`.
          lpips: a distance whose figures the provenance has too, such as `dalle2_jax.evaluation.lpips.load` returns.
          **options: see `SampleOptions`; ``num`` is 1 by default.

        Raises:
          ConfigError: a number of components is not from 1 to the rank of the embeddings.
          UserError: the components were not measured.
        """
        if steps is not None:
            options["decoder"] = {**options.get("decoder", {}), "steps": steps}
        given = read_images(images)
        inputs = {"image": [image.name for image in given], "whole_inversion": whole_inversion}
        if components:
            inputs["components"] = [int(each) if isinstance(each, np.integer) else each for each in components]
        call = with_inversion(self.call("reconstruct", options, inputs=inputs, num=1), 0.0)
        return self._projected(call, given, prompt, lpips) if components else self._again(call, given, prompt, lpips)

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
          image: the image. One that is not square keeps its shape: the longer side is scaled to the size of generated
            images. Where nothing is regenerated the result has its pixels.
          mask: an image of the same size, or a bool array [H, W]: white, or True, where the image is regenerated.
          prompt: what to generate; None takes the image's own CLIP embedding in place of a caption's.
          resample: (jump, times) of RePaint: every stretch of ``jump`` steps is taken ``times`` times, which fits the
            new part better to the old.
          image_emb: with a prompt, as in `text2image`.
          **options: see `SampleOptions`.
        """
        given = read_image(image)
        regenerated = read_mask(mask, given)
        mask_name = str(mask) if isinstance(mask, str | os.PathLike) else "given in memory"
        call, condition = self._part("inpaint", given, prompt, image_emb, options)
        call = call.with_inputs(mask=mask_name, resample=resample and list(resample))
        return inpainting.inpaint(call, given, regenerated, condition, resample)

    def outpaint(
        self,
        image: ImageLike,
        prompt: str | None = None,
        *,
        margins: tuple[int, int, int, int],
        resample: tuple[int, int] | None = None,
        image_emb: str = "prior",
        **options: Unpack[SampleOptions],
    ) -> Images:
        """Extends an image beyond its edges, by windows of the size of generated images that move outwards.

        The image's shorter side is scaled to that size; its pixels are then those of the result.

        Args:
          image: the image.
          prompt: as in `inpaint`.
          margins: pixels to add on the left, on the right, at the top and at the bottom, of the size of the result.
          resample: as in `inpaint`.
          image_emb: as in `inpaint`.
          **options: see `SampleOptions`.

        Raises:
          ConfigError: a margin is out of range, or all of them are 0.
          UsageError: the result would have more than 2^25 pixels.
        """
        names = inpainting.Margins._fields
        if len(margins) != len(names) or not any(margins):
            raise ConfigError(f"margins must be four pixel counts ({', '.join(names)}), one above 0", "margins")
        for name, margin in zip(names, margins, strict=True):
            check_number(name, margin, Range(0, inpainting.MAX_MARGIN))
        given = read_image(image)
        call, condition = self._part("outpaint", given, prompt, image_emb, options)
        call = call.with_inputs(margins=list(margins), resample=resample and list(resample))
        return inpainting.outpaint(call, given, inpainting.Margins(*margins), condition, resample)

    # --- inside ---------------------------------------------------------------------------------

    def _part(
        self, command: str, image: InputImage, prompt: str | None, image_emb: str, options: SampleOptions
    ) -> tuple[Call, inpainting.Conditioning]:
        """Returns the call that generates a part of an image, and what that is conditioned on.

        That is a caption, or without one the image's own embedding. A decoder without image embeddings is unconditional
        without a caption.
        """
        if image_emb != "prior":
            self._check_conditioning(image_emb)
        uses_prior = prompt is not None and self.embeds_images and image_emb == "prior"
        call = self.call(command, options, uses_prior, {"image": image.name, "image_emb": image_emb})
        if prompt is None:
            emb = self._embed_inputs([image]) if self.embeds_images else None
            return call, inpainting.Conditioning("", emb)
        emb = self.embed_text(prompt) if image_emb == "text" else None
        return call, inpainting.Conditioning(read_caption(prompt), emb, image_emb == "none")

    def _encoded(
        self, call: Call, inputs: Sequence[InputImage], prompt: str
    ) -> tuple[Generator, ImageEmb, Noise | None]:
        """Returns a generator, and the embeddings and noises of images; no noise where it is to be fresh."""
        self._check_conditioning()
        call.options.check_count(len(inputs))
        generator, emb = Generator(call), self._embed_inputs(inputs)
        if call.inputs.get("eta", 0.0) is None:
            return generator, emb, None
        return generator, emb, inverted_noise(generator, inputs, emb, prompt, call.inputs["whole_inversion"])

    def _again(self, call: Call, inputs: Sequence[InputImage], prompt: str, lpips: Distance | None) -> Images:
        """Generates images from their own embeddings and noises."""
        prompt = read_caption(prompt)
        generator, emb, x_T = self._encoded(call, inputs, prompt)
        names = [prompt or image.short_name for image in inputs]
        return decode_each(generator, emb, x_T, prompt, describer(names, generator.output_sized(inputs), lpips))

    def _projected(self, call: Call, inputs: Sequence[InputImage], prompt: str, lpips: Distance | None) -> Images:
        """Generates images from projections of their embeddings, in a row for each image."""
        self._check_conditioning()
        counts = call.inputs["components"]
        call.options.check_count(len(inputs) * len(counts))
        generator, clip = Generator(call), self._stage("clip")
        emb = self._embed_inputs(inputs)
        known = Components.read(StageFolder(self.path, "clip"), clip.step, emb.shape[1])
        projected = np.stack([known.project(emb, count) for count in counts], axis=1).reshape(-1, emb.shape[1])
        names = [f"{image.short_name}, {count} components" for image in inputs for count in counts]
        given = generator.output_sized(inputs).repeat(len(counts), axis=0)
        return decode_path(
            generator, projected, None, read_caption(prompt), describer(names, given, lpips), len(counts)
        )
