"""`EmbeddingEdits`: methods of `System` that combine the CLIP embeddings of images and captions."""

import dataclasses
from collections.abc import Sequence
from typing import Unpack

import numpy as np
from jaxtyping import Float32

from dalle2_jax.errors import ConfigError, UsageError
from dalle2_jax.ranges import Range
from dalle2_jax.stages.clip import MAX_LOG_SCALE
from dalle2_jax.system.base import SystemBase, read_caption
from dalle2_jax.system.editing.frames import (
    DEPTH,
    decode_each,
    decode_even_path,
    decode_path,
    decode_with_inputs,
    inverted_noise,
    text_diff_prompts,
    with_depth,
    with_inversion,
)
from dalle2_jax.system.editing.geometry import path, positions, slerp, text_direction, weighted_mean
from dalle2_jax.system.editing.similarity import Distance, root_mean_square
from dalle2_jax.system.editing.typography import probabilities, with_word
from dalle2_jax.system.generation import Generator
from dalle2_jax.system.images import Images
from dalle2_jax.system.inputs import ImageLike, ImagesLike, InputImage, read_captions, read_image, read_images, square
from dalle2_jax.system.options import SampleOptions, check_fraction, check_interval, check_number

MAX_FRAMES = 1_000

MAX_EVEN_FRAMES = 64
"""Most frames of an even path from one point to the next: all pairs of its images are compared."""

MAX_WEIGHT = 1_000
"""Largest absolute weight of an embedding."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EmbeddingEdits(SystemBase):
    """Mixtures, interpolations and text differences."""

    def mix(
        self,
        images: ImagesLike = (),
        captions: str | Sequence[str] = (),
        *,
        weights: Sequence[float] | None = None,
        prompt: str = "",
        image_emb: str = "prior",
        **options: Unpack[SampleOptions],
    ) -> Images:
        """Generates images from a weighted mean of the CLIP embeddings of images and captions.

        Args:
          images: none, one or several images.
          captions: none, one or several captions, each of which becomes an image embedding.
          weights: a number for each image and then for each caption; a negative one moves away from it. None weights
            all alike.
          prompt: a caption, for decoders that read one.
          image_emb: "prior" samples an embedding for each caption, "text" takes its text embedding.
          **options: see `SampleOptions`.

        Raises:
          UsageError: nothing is given; another number of weights; or weighted embeddings that cancel each other out.
        """
        given, texts = self._read_points(images, captions, image_emb)
        if not given and not texts:
            raise UsageError("mix needs images, captions or both")
        factors = _read_weights(weights, len(given) + len(texts))
        inputs = {"image": [image.name for image in given], "caption": texts, "weights": factors.tolist()}
        uses_prior = bool(texts) and image_emb == "prior"
        call = self.call("mix", options, uses_prior, {**inputs, "image_emb": image_emb})
        generator = Generator(call)
        emb = weighted_mean(self._embed_points(generator, given, texts, image_emb), factors)
        names = [*(image.short_name for image in given), *texts]
        shown = " ".join(f"{factor:+g} {name}" for factor, name in zip(factors, names, strict=True))
        return decode_each(generator, emb[None], None, read_caption(prompt), [shown])

    def interpolate(
        self,
        images: ImagesLike = (),
        captions: str | Sequence[str] = (),
        *,
        frames: int = 8,
        eta: float | None = None,
        even: bool | Distance = False,
        prompt: str = "",
        image_emb: str = "prior",
        whole_inversion: bool = False,
        **options: Unpack[SampleOptions],
    ) -> Images:
        """Generates the images on a path through given ones and through captions (section 3.2).

        The CLIP embeddings of neighbours are interpolated spherically.

        Args:
          images: the points of the path that are images.
          captions: the points that are captions, after the images; each becomes an image embedding.
          frames: images from each point to the next, both included.
          eta: None gives all frames of a sequence the same fresh noise. Else the noise of the images is interpolated,
            so that with 0 the frames at images reconstruct them; captions have the noise of the last image.
          even: whether the frames are placed where neighbours are about equally far apart, in place of equal rotations:
            by the pixels' root mean squared difference, or by a distance such as `dalle2_jax.evaluation.lpips.load`
            returns. About 5 images are generated for each of at most 64 frames.
          prompt: a caption, for decoders that read one.
          image_emb: as in `mix`.
          whole_inversion: as in `variations`.
          **options: see `SampleOptions`; ``num``, by default 1, is the number of sequences.

        Raises:
          UsageError: fewer than two images and captions.
          ConfigError: ``frames`` or ``eta`` is out of range, or ``eta`` is given without an image.
        """
        check_number("frames", frames, Range(2, MAX_EVEN_FRAMES if even else MAX_FRAMES))
        if eta is not None:
            check_fraction("eta", eta)
        given, texts = self._read_points(images, captions, image_emb)
        if len(given) + len(texts) < 2:
            raise UsageError(f"interpolate needs two or more images and captions, got {len(given) + len(texts)}")
        if eta is not None and not given:
            raise ConfigError("eta starts from the noise of an image, and none is given: leave it out", "eta")
        inputs = {"image": [image.name for image in given], "caption": texts, "frames": frames, "eta": eta}
        inputs |= {"even": bool(even), "whole_inversion": whole_inversion, "image_emb": image_emb}
        uses_prior = bool(texts) and image_emb == "prior"
        call = self.call("interpolate", options, uses_prior, inputs, num=1)
        where = positions(len(given) + len(texts), frames)
        call.options.check_count(len(where))
        generator, ends = Generator(with_inversion(call, eta)), None
        emb = self._embed_points(generator, given, texts, image_emb)
        if eta is not None:
            ends = inverted_noise(generator, given, emb[: len(given)], read_caption(prompt), whole_inversion)
            ends = np.concatenate([ends, *[ends[-1:]] * len(texts)])
        if even:
            distance = even if callable(even) else root_mean_square
            return decode_even_path(generator, emb, ends, read_caption(prompt), frames, distance)
        x_T = None if ends is None else path(ends, frames)
        shown = [f"{place:.2f}" for place in where]
        return decode_path(generator, path(emb, frames), x_T, read_caption(prompt), shown)

    def text_diff(
        self,
        image: ImageLike,
        before: str | Sequence[str] | None,
        after: str,
        *,
        frames: int = 8,
        theta: float | tuple[float, float] = 0.5,
        depth: float = DEPTH,
        prompt: str | None = None,
        whole_inversion: bool = False,
        **options: Unpack[SampleOptions],
    ) -> Images:
        """Changes an image by the difference between two captions (section 3.3).

        The image's CLIP embedding is rotated towards the normalised difference of the text embeddings, with the
        noise that DDIM inversion finds. The frame at rotation 0 reconstructs the image.

        Args:
          image: the image.
          before: a caption of the image; several, of which the mean is taken; or None for the direction of ``after``
            alone.
          after: a caption of what it becomes.
          frames: number of images.
          theta: the rotation of the last frame, as a fraction of the angle to the difference, or those of the first
            and the last frame, (0, theta) by default; the paper's last ones are 0.25 to 0.5.
          depth: the share of the noise schedule that the image is inverted to and sampled from, above 0. Small ones
            keep outlines and places; the paper inverts to its end, 1.
          prompt: a caption of all frames and of the inversion, for decoders that read one; "" for none. By default the
            frames have the caption ``after``; the inversion and the frame at rotation 0 have none.
          whole_inversion: as in `variations`; only with ``depth`` 1.
          **options: see `SampleOptions`; ``num``, by default 1, is the number of sequences.
        """
        check_number("frames", frames, Range(2, MAX_FRAMES))
        if isinstance(theta, tuple | list):
            check_interval("theta", theta)
        else:
            check_fraction("theta", theta)
        first, last = theta if isinstance(theta, tuple | list) else (0.0, theta)
        given, base = read_image(image), None if before is None else read_captions(before)
        inputs = {"image": given.name, "from": base[0] if base and len(base) == 1 else base, "to": read_caption(after)}
        inputs |= {"frames": frames, "theta": theta, "depth": depth, "whole_inversion": whole_inversion}
        self._check_conditioning()
        call = with_inversion(self.call("text_diff", options, inputs=inputs, num=1), 0.0)
        generator = Generator(with_depth(call, depth, whole_inversion))
        generator.call.options.check_count(frames)
        emb = self._embed_inputs([given])
        target = text_direction(
            self.embed_text(after)[0],
            None if base is None else self.embed_text(base),
            float(np.linalg.norm(emb[0])),
        )
        angles = np.linspace(first, last, frames)
        caption = None if prompt is None else read_caption(prompt)
        prompts = text_diff_prompts(call, read_caption(after), caption, angles)
        x_T = inverted_noise(generator, [given], emb, caption or "", whole_inversion).repeat(frames, axis=0)
        shown = [f"{angle:.2f}" for angle in angles]
        return decode_path(generator, slerp(emb[0], target, angles), x_T, prompts, shown)

    def typographic_probe(
        self,
        image: ImageLike,
        word: str,
        labels: Sequence[str],
        *,
        size: float = 0.8,
        prompt: str = "",
        **options: Unpack[SampleOptions],
    ) -> Images:
        """Shows what CLIP recognises in an image, and in the same image with a word pasted on it (figure 6).

        The result has a row for each of the two images: the image itself, with CLIP's zero-shot probabilities of the
        labels, and ``num`` variations of it. Both rows have the same noise. The provenance has the probabilities of
        both images, as "probabilities".

        Args:
          image: the image; its central square is used.
          word: the word.
          labels: two or more captions.
          size: width of the word's label over that of the image, above 0 and at most 1.
          prompt: a caption of the variations, for decoders that read one.
          **options: see `SampleOptions`; ``num``, by default 3, is the number of variations.

        Raises:
          UsageError: the word is empty or too long, or there are fewer than two labels.
        """
        check_fraction("size", size)
        captions, caption = read_captions(labels), read_caption(prompt)
        if isinstance(labels, str) or len({*captions}) < 2:
            raise UsageError(f"typographic_probe needs two or more different labels, got {len({*captions})}")
        if not size:
            raise ConfigError("size must be above 0", "size")
        self._check_conditioning()
        given = read_image(image)
        plain = square(given.pixels, min(given.pixels.shape[:2]))
        shown = [plain, with_word(plain, read_caption(word), size)]
        inputs = {"image": given.name, "word": word, "labels": captions, "size": size}
        generator = Generator(self.call("typographic_probe", options, inputs=inputs, num=3))
        pair = [InputImage(pixels, given.name) for pixels in shown]
        emb, log_scale = self._embed_inputs(pair), self._stage("clip").variables.params["logit_scale"]
        found = probabilities(emb, self.embed_text(captions), min(float(log_scale), MAX_LOG_SCALE))
        return decode_with_inputs(generator, emb, generator.output_sized(pair), caption, (captions, found))

    # --- inside ---------------------------------------------------------------------------------

    def _read_points(
        self, images: ImagesLike, captions: str | Sequence[str], image_emb: str
    ) -> tuple[list[InputImage], list[str]]:
        """Returns images and captions, of which there may be none. UsageError for an ``image_emb`` that is neither."""
        if image_emb not in ("prior", "text"):
            raise UsageError(f"image_emb must be 'prior' or 'text' here, got {image_emb!r}")
        self._check_conditioning()
        none = isinstance(images, list | tuple) and not images
        return [] if none else read_images(images), [] if not captions and captions != "" else read_captions(captions)

    def _embed_points(
        self, generator: Generator, images: Sequence[InputImage], captions: Sequence[str], image_emb: str
    ) -> Float32[np.ndarray, "N E"]:
        """Returns the embeddings of images, and then of captions."""
        rows = [self._embed_inputs(images)] if images else []
        if captions:
            rows.append(self._embed_captions(generator, captions, image_emb))
        return np.concatenate(rows)


def _read_weights(weights: Sequence[float] | None, count: int) -> np.ndarray:
    """Returns a weight for each embedding. UsageError for another number of them, or one that is out of range."""
    if weights is None:
        return np.ones(count)
    numbers = list(weights)
    if len(numbers) != count:
        raise UsageError(f"{len(numbers)} weights are given for {count} images and captions: give one for each")
    for number in numbers:
        if (
            isinstance(number, bool)
            or not isinstance(number, int | float | np.number)
            or not (abs(float(number)) <= MAX_WEIGHT)
        ):
            raise ConfigError(f"weights must be numbers from -{MAX_WEIGHT} to {MAX_WEIGHT}, got {number!r}", "weights")
    if not any(numbers):
        raise ConfigError("weights are all 0: give at least one other", "weights")
    return np.asarray(numbers, np.float64)
