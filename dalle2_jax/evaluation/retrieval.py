"""How well CLIP tells captions apart: recall@1 among N pictures and their N captions (Radford et al. 2021, 3.1)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from dalle2_jax.data import ShapesSource, Source


def distinct_examples(source: Source, count: int) -> list[int]:
    """Returns the first ``count`` examples of which no two could share a caption.

    Of ``shapes``, scenes that differ in more than the background, which captions may leave out, and
    than the order of their objects ("a left of b", "b right of a"); of other sources, examples with
    different captions. Fewer where the source has no more.
    """
    seen, indices = set(), []
    for index in range(len(source)):
        if isinstance(source, ShapesSource):
            *objects, relation, _ = source.scene(index).attributes
            identity = frozenset(objects), relation in ("above", "below")
        else:
            identity = source[index]["caption"]
        if identity not in seen:
            seen.add(identity)
            indices.append(index)
            if len(indices) == count:
                break
    return indices


def recall_at_1(
    image_emb: Float[np.ndarray, "N E"], text_emb: Float[np.ndarray, "N E"]
) -> dict[str, float]:
    """Returns the shares of pictures whose nearest caption is their own, of captions likewise, and of chance."""
    image_emb, text_emb = (emb / np.linalg.norm(emb, axis=1, keepdims=True) for emb in (image_emb, text_emb))
    similarity = image_emb @ text_emb.T
    own = np.arange(len(similarity))
    return {
        "image_to_text": float(np.mean(similarity.argmax(axis=1) == own)),
        "text_to_image": float(np.mean(similarity.argmax(axis=0) == own)),
        "chance": 1 / len(own),
    }


def table(title: str, columns: dict[str, dict[str, float]], rows: Sequence[str] | None = None) -> str:
    """Formats rates as a table, a column a dictionary, in percent."""
    rows = rows or list(next(iter(columns.values())))
    width = max(len(title), *(len(row) for row in rows))
    lines = [f"{title:<{width}}" + "".join(f"{name:>12}" for name in columns)]
    for row in rows:
        cells = (f"{100 * rates[row]:11.1f}%" if row in rates else f"{'-':>12}" for rates in columns.values())
        lines.append(f"{row:<{width}}" + "".join(cells))
    return "\n".join(lines)
