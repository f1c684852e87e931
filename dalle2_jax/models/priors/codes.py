"""Quantisation of embeddings to sequences of integers, by decreasing variance: the codes of the autoregressive prior.

Ramesh et al. 2022, section 2.2: principal components of CLIP image embeddings, ordered by
decreasing eigenvalue, each quantised into buckets. With mean m, eigenvectors U and, for component
k, edges e_k and centres c_k,

    y = U^T (z - m),    code_k = #{j : e_kj <= y_k}                                            (1)
    z' = m + U c[code]                                                                         (2)

The paper does not specify the buckets. Here each holds the same number of calibration examples and is decoded to
their mean, so every code is used equally often and, for such buckets, the mean squared error is minimal. Hence
|y_k - y'_k| is at most the width of its bucket, except beyond the extremes of the calibration examples.

The fit is computed on the host in float64; the results are float32 arrays, stored as statistics of the stage.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dalle2_jax.errors import UserError
from dalle2_jax.types import Params

_EXACT = jax.lax.Precision.HIGHEST  # accelerators round float32 products to fewer digits than 1,024 buckets have


def empty(embed_dim: int, components: int, buckets: int) -> Params:
    """Returns zeros in the shapes that ``fit`` fills."""
    return {
        "mean": jnp.zeros(embed_dim),
        "basis": jnp.zeros((embed_dim, components)),
        "edges": jnp.zeros((components, buckets - 1)),
        "centres": jnp.zeros((components, buckets)),
        "dot_edges": jnp.zeros(buckets - 1),
    }


def fit(image_emb: Float[np.ndarray, "M E"], dots: Float[np.ndarray, "M"], components: int, buckets: int) -> Params:
    """Estimates components and buckets from M examples.

    Args:
      image_emb: image embeddings in the space of the embedding contract.
      dots: the dot product of each with its text embedding.
      components: number of principal components, K.
      buckets: number of values of a code, Q.

    Returns:
      ``mean`` [E], ``basis`` [E, K], ``edges`` [K, Q - 1], ``centres`` [K, Q] and ``dot_edges`` [Q - 1].

    Raises:
      UserError: fewer examples than buckets, or embeddings that are not finite.
    """
    if len(image_emb) < buckets:
        raise UserError(f"{len(image_emb)} examples cannot fill {buckets} buckets: calibrate on more, or use fewer")
    if not (np.isfinite(image_emb).all() and np.isfinite(dots).all()):
        raise UserError("CLIP's embeddings of the training data are not finite: train clip again")
    image_emb = np.asarray(image_emb, np.float64)
    mean = image_emb.mean(axis=0)
    centred = image_emb - mean
    _, vectors = np.linalg.eigh(centred.T @ centred)  # by increasing eigenvalue
    basis = vectors[:, ::-1][:, :components]
    # An eigenvector's sign is arbitrary; its largest entry is made positive.
    basis = basis * np.sign(np.take_along_axis(basis, np.abs(basis).argmax(axis=0)[None], axis=0))
    edges, centres = _equal_buckets(centred @ basis, buckets)
    dot_edges, _ = _equal_buckets(np.asarray(dots, np.float64)[:, None], buckets)
    stats = {"mean": mean, "basis": basis, "edges": edges, "centres": centres, "dot_edges": dot_edges[0]}
    return {name: np.asarray(value, np.float32) for name, value in stats.items()}


def components_needed(image_emb: Float[np.ndarray, "M E"], share: float) -> int:
    """Returns the least number of principal components that retain a share of the variance of embeddings."""
    centred = image_emb.astype(np.float64) - image_emb.mean(axis=0, dtype=np.float64)
    retained = np.cumsum(np.linalg.eigvalsh(centred.T @ centred)[::-1])
    return min(len(retained), int(np.searchsorted(retained, share * retained[-1] * (1 - 1e-9))) + 1)


def _equal_buckets(values: np.ndarray, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits each column of [M, K] into equal shares; returns their edges and means, [K, Q - 1] and [K, Q]."""
    values = np.sort(values, axis=0)
    starts = np.arange(buckets) * len(values) // buckets
    counts = np.diff(starts, append=len(values))
    centres = np.add.reduceat(values, starts, axis=0) / counts[:, None]
    edges = (values[starts[1:] - 1] + values[starts[1:]]) / 2
    return edges.T, centres.T


def encode(stats: Params, image_emb: Float[Array, "B E"]) -> Int[Array, "B K"]:
    """Returns the codes of embeddings, by (1)."""
    centred = image_emb - stats["mean"][None]
    components = jnp.matmul(centred, stats["basis"], precision=_EXACT)
    return jax.vmap(_bucket, in_axes=(0, 1), out_axes=1)(stats["edges"], components)


def encode_dot(stats: Params, image_emb: Float[Array, "B E"], text_emb: Float[Array, "B E"]) -> Int[Array, "B"]:
    """Returns the bucket of each pair's dot product: code q of Q is the share [q/Q, (q + 1)/Q) of training pairs."""
    return _bucket(stats["dot_edges"], jnp.sum(image_emb * text_emb, axis=-1))


def decode(stats: Params, codes: Int[Array, "B K"]) -> Float[Array, "B E"]:
    """Returns the embeddings of codes, by (2)."""
    components = jnp.take_along_axis(stats["centres"].T, codes, axis=0)
    return stats["mean"][None] + jnp.matmul(components, stats["basis"].T, precision=_EXACT)


def _bucket(edges: Float[Array, "Q"], values: Float[Array, "B"]) -> Int[Array, "B"]:
    return jnp.searchsorted(edges, values, side="right")
