"""How well images of shapes match their captions, as read by `dalle2_jax.data.synthetic.scene_reader`.

The same measure for shuffled captions is the baseline: that of images that ignore their captions.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from dalle2_jax.data.synthetic.grammar import mentions_background
from dalle2_jax.data.synthetic.scene_reader import ATTRIBUTES, matches, read_scene
from dalle2_jax.data.synthetic.scenes import Scene

_BY_COUNT = {1: "one_object", 2: "two_objects"}
"""Names of the rates of images that are right in everything, by the number of objects of the scene."""


def attribute_accuracy(
    images: UInt8[np.ndarray, "B H W 3"],
    scenes: Sequence[Scene],
    captions: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float] | dict[str, int]]:
    """Measures images against the scenes of their captions.

    Args:
        images: uint8[B, H, W, 3].
        scenes: the scene of each image's caption.
        captions: the captions; the background counts only where the caption names it. None: it always counts.
        seed: of the shuffle.

    Returns:
        ``{"matched": rates, "shuffled": rates, "n": counts}``. Rates in [0, 1] by attribute (`ATTRIBUTES`):
        ``relation`` over the scenes of two objects and ``background`` over those that count, each missing if there
        are none; ``one_object`` and ``two_objects`` are ``all`` over the scenes with as many. "shuffled" pairs every
        image with the scene and caption of another image. "n" is the number of examples of each rate, the same for
        both.

    Raises:
        ValueError: the lengths differ, or there are no images.
    """
    named: list[str | None] = [None] * len(scenes) if captions is None else list(captions)
    if not len(images) == len(scenes) == len(named) > 0:
        raise ValueError(f"{len(images)} images, {len(scenes)} scenes and {len(named)} captions")
    readings = [read_scene(image) for image in images]
    # A cycle through a random order: in a plain shuffle some images would keep their own caption.
    order = np.random.default_rng(seed).permutation(len(scenes))
    other = np.empty(len(scenes), int)
    other[order] = np.roll(order, 1)
    matched = _hits(readings, scenes, named)
    shuffled = _hits(readings, [scenes[index] for index in other], [named[index] for index in other])
    return {
        "matched": {name: float(np.mean(judged)) for name, judged in matched.items()},
        "shuffled": {name: float(np.mean(judged)) for name, judged in shuffled.items()},
        "n": {name: len(judged) for name, judged in matched.items()},
    }


def _hits(readings: Sequence[Scene], scenes: Sequence[Scene], captions: Sequence[str | None]) -> dict[str, list[bool]]:
    """Returns whether each image matches each attribute, for those that count."""
    hits: dict[str, list[bool]] = {name: [] for name in (*ATTRIBUTES, *_BY_COUNT.values())}
    for reading, scene, caption in zip(readings, scenes, captions, strict=True):
        judged = matches(reading, scene, caption)
        counts = {
            "relation": len(scene.objects) == 2,
            "background": caption is None or mentions_background(caption),
        }
        for name in ATTRIBUTES:
            if counts.get(name, True):
                hits[name].append(judged[name])
        hits[_BY_COUNT[len(scene.objects)]].append(judged["all"])
    return {name: judged for name, judged in hits.items() if judged}
