"""How well pictures obey their captions, read by `dalle2_jax.data.scene_reader`.

The same measure for shuffled captions stands beside it: what pictures that ignore their captions would get.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from dalle2_jax.data.grammar import mentions_background
from dalle2_jax.data.scene_reader import ATTRIBUTES, matches, read_scene
from dalle2_jax.data.scenes import Scene


def attribute_accuracy(
    images: UInt8[np.ndarray, "B H W 3"],
    scenes: Sequence[Scene],
    captions: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Measures pictures against the scenes that were asked for.

    Args:
        images: uint8[B, H, W, 3].
        scenes: the scene of each picture's caption.
        captions: the captions; the background counts only where the caption names it. None: it always counts.
        seed: of the shuffle.

    Returns:
        ``{"matched": rates, "shuffled": rates}``. Rates in [0, 1] by attribute (`ATTRIBUTES`): ``relation`` over
        the scenes of two objects and ``background`` over those that count, each left out where there are none.
        Shuffled pairs every picture with the scene and caption of another picture.

    Raises:
        ValueError: when the lengths differ, or there are no pictures.
    """
    captions = [None] * len(scenes) if captions is None else list(captions)
    if not len(images) == len(scenes) == len(captions) > 0:
        raise ValueError(f"{len(images)} images, {len(scenes)} scenes and {len(captions)} captions")
    readings = [read_scene(image) for image in images]
    # A cycle through a random order: no picture keeps its own caption, as a plain shuffle would let some.
    order = np.random.default_rng(seed).permutation(len(scenes))
    other = np.empty(len(scenes), int)
    other[order] = np.roll(order, 1)
    return {
        "matched": _rates(readings, scenes, captions),
        "shuffled": _rates(readings, [scenes[index] for index in other], [captions[index] for index in other]),
    }


def _rates(readings: Sequence[Scene], scenes: Sequence[Scene], captions: Sequence[str | None]) -> dict[str, float]:
    hits: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    for reading, scene, caption in zip(readings, scenes, captions, strict=True):
        judged = matches(reading, scene, caption)
        counts = {
            "relation": len(scene.objects) == 2,
            "background": caption is None or mentions_background(caption),
        }
        for name in ATTRIBUTES:
            if counts.get(name, True):
                hits[name].append(judged[name])
    return {name: float(np.mean(judged)) for name, judged in hits.items() if judged}
