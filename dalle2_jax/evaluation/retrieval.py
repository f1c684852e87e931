"""Retrieval with CLIP: recall@1 among N images and their N captions (Radford et al. 2021, section 3.1)."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from dalle2_jax.data import ShapesSource, Source, example
from dalle2_jax.evaluation import intervals


def distinct_examples(source: Source, count: int) -> list[int]:
    """Returns the indices of the first ``count`` examples of which no two could share a caption.

    For ``shapes`` these are scenes that differ in more than the background, which captions may omit, and the order of
    their objects ("a left of b", "b right of a"); for other sources, examples with different captions. There are fewer
    if the source has no more.
    """
    seen, indices = set(), []
    for index in range(len(source)):
        if isinstance(source, ShapesSource):
            *objects, relation, _ = source.scene(index).attributes
            identity = frozenset(objects), relation in ("above", "below")
        else:
            identity = example(source, index)["caption"]
        if identity not in seen:
            seen.add(identity)
            indices.append(index)
            if len(indices) == count:
                break
    return indices


def recall_at_1(image_emb: Float[np.ndarray, "N E"], text_emb: Float[np.ndarray, "N E"]) -> dict[str, float]:
    """Returns the fraction of images whose nearest caption is their own, the reverse, and chance."""
    image_emb, text_emb = (emb / np.linalg.norm(emb, axis=1, keepdims=True) for emb in (image_emb, text_emb))
    similarity = image_emb @ text_emb.T
    own = np.arange(len(similarity))
    return {
        "image_to_text": float(np.mean(similarity.argmax(axis=1) == own)),
        "text_to_image": float(np.mean(similarity.argmax(axis=0) == own)),
        "chance": 1 / len(own),
    }


def table(title: str, columns: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]) -> str:
    """Formats rates as a table: one column per mapping, in percent with 95 % intervals, and the number of examples.

    A rate without a count, such as chance, has no interval.
    """
    rows = list(next(iter(columns.values())))
    width = max(len(title), *(len(row) for row in rows))
    lines = [f"{title:<{width}}" + f"{'n':>7}" + "".join(f"{name:>23}" for name in columns)]
    for row in rows:
        cells = (_cell(rates[row], counts.get(row)) if row in rates else "-" for rates in columns.values())
        lines.append(f"{row:<{width}}" + f"{counts.get(row, '-'):>7}" + "".join(f"{cell:>23}" for cell in cells))
    return "\n".join(lines)


def _cell(rate: float, count: int | None) -> str:
    return f"{100 * rate:.1f}%" if count is None else intervals.in_percent(rate, intervals.wilson(rate, count))
