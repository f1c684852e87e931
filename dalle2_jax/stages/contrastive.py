"""Losses of CLIP over all pairs of a batch, in bounded memory: softmax (Radford et al. 2021) and sigmoid (SigLIP).

With unit embeddings x_i of images and y_j of captions, scale s and offset b, the logits are l_ij = s x_i . y_j + b.
The softmax loss (Radford et al. 2021, figure 3; b = 0) and the sigmoid loss (Zhai et al. 2023, arXiv 2303.15343,
section 3.2, with z_ij = 1 for i = j, else -1) are

    L_softmax = 1 / (2B) sum_i [LSE_j l_ij - l_ii] + 1 / (2B) sum_j [LSE_i l_ij - l_jj]       (1)
    L_sigmoid = -1 / B sum_ij log sigmoid(z_ij l_ij)                                          (2)

and their derivatives by the logits

    dL_softmax / dl_ij = (exp(l_ij - LSE_j l_ij) + exp(l_ij - LSE_i l_ij)) / (2B) - [i = j] / B  (3)
    dL_sigmoid / dl_ij = -z_ij sigmoid(-z_ij l_ij) / B                                        (4)

The B x B logits are never stored whole. The softmax loss takes ``chunks`` parts of the rows, then of the columns, one
after the other, and computes the logits again for the gradients, eq. (3): B^2 / chunks logits, of which a device has
its own rows. The sigmoid loss needs no sums over rows or columns. Each device compares its own images with the captions
of one device at a time, which pass from device to device (section 3.3): its memory does not grow with their number.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from dalle2_jax.errors import choose
from dalle2_jax.ranges import Range
from dalle2_jax.stages.base import dividing_axes

LOSSES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """CLIP's loss.

    Attributes:
      loss: "softmax" or "sigmoid".
      chunks: number of parts in which the logits of the softmax loss are computed; 1 computes them at once.

    Raises:
      UsageError: an unknown loss.
    """

    loss: str = "softmax"
    chunks: Annotated[int, Range(1, 1_000_000)] = 1

    def __post_init__(self) -> None:
        choose("loss", self.loss, dict.fromkeys(LOSSES))


class Contrast(NamedTuple):
    """The loss of a batch, and whether each image's largest logit is its own caption's, and the reverse."""

    loss: Float[Array, ""]
    image_to_text: Bool[Array, "B"]
    text_to_image: Bool[Array, "B"]


def softmax_loss(
    image_emb: Float[Array, "B E"], text_emb: Float[Array, "B E"], scale: Float[Array, ""], chunks: int = 1
) -> Contrast:
    """Returns eq. (1) of unit embeddings.

    Args:
      image_emb: unit-norm rows.
      text_emb: unit-norm rows, of the captions of the same examples.
      scale: s.
      chunks: number of parts of the rows, and of the columns. A batch that it does not divide has their greatest common
        divisor.
    """
    chunks = math.gcd(chunks, len(image_emb))
    if chunks > 1:
        in_chunks = jax.custom_vjp(lambda *args: _softmax_forward(chunks, *args)[0])
        in_chunks.defvjp(functools.partial(_softmax_forward, chunks), functools.partial(_softmax_backward, chunks))
        return Contrast(*in_chunks(image_emb, text_emb, scale))
    import optax  # for training only

    logits = scale * image_emb @ text_emb.T
    labels = jnp.arange(logits.shape[0])
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    loss = 0.5 * (cross_entropy(logits, labels).mean() + cross_entropy(logits.T, labels).mean())
    return Contrast(loss, logits.argmax(axis=1) == labels, logits.argmax(axis=0) == labels)


def _softmax_forward(
    chunks: int, x: jax.Array, y: jax.Array, scale: jax.Array
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple]:
    """Returns the parts of `Contrast`, by eq. (1), and what the gradients need."""

    def sums(of: jax.Array, to: jax.Array) -> tuple[jax.Array, jax.Array]:
        def part(rows: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = scale * rows @ to.T
            return jax.nn.logsumexp(logits, axis=1), logits.argmax(axis=1) == own

        return _by_chunks(chunks, part, of, jnp.arange(len(of)))

    (row_lse, image_hit), (column_lse, text_hit) = sums(x, y), sums(y, x)
    own = scale * jnp.sum(x * y, axis=1)
    loss = jnp.mean(0.5 * (row_lse + column_lse) - own)
    return (loss, image_hit, text_hit), (x, y, scale, row_lse, column_lse)


def _softmax_backward(chunks: int, saved: tuple, cotangents: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eq. (3). Rows and columns each get their own pass, so that no sum over devices is part of one."""
    x, y, scale, row_lse, column_lse = saved
    weight = cotangents[0] / len(x)

    def gradient(of: jax.Array, to: jax.Array, of_lse: jax.Array, to_lse: jax.Array) -> tuple[jax.Array, jax.Array]:
        def part(rows: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = scale * rows @ to.T
            shares = jnp.exp(logits - lse[:, None]) + jnp.exp(logits - to_lse[None])
            return shares @ to, jnp.sum(shares * logits, axis=1)

        pulled, weighted = _by_chunks(chunks, part, of, of_lse)
        return weight * scale * (0.5 * pulled - to), weighted

    of_x, weighted = gradient(x, y, row_lse, column_lse)
    of_y, _ = gradient(y, x, column_lse, row_lse)
    of_scale = weight * (0.5 * jnp.sum(weighted) / scale - jnp.sum(x * y))
    return of_x, of_y, of_scale


def _by_chunks(chunks: int, function: Callable, *columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Applies a function of rows to columns [B, ...] in ``chunks`` parts, each of rows from every device."""
    size = len(columns[0]) // chunks
    parts = tuple(column.reshape(size, chunks, *column.shape[1:]).swapaxes(0, 1) for column in columns)
    results = jax.lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda part: part.swapaxes(0, 1).reshape(-1, *part.shape[2:]), results)


def sigmoid_loss(
    image_emb: Float[Array, "B E"], text_emb: Float[Array, "B E"], scale: Float[Array, ""], bias: Float[Array, ""]
) -> Contrast:
    """Returns eq. (2) of unit embeddings; a device holds the logits of its own images and one device's captions.

    Args:
      image_emb: unit-norm rows.
      text_emb: unit-norm rows, of the captions of the same examples.
      scale: s.
      bias: b.
    """
    axes = dividing_axes()
    count = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in axes)
    # One scale and bias a device: their gradients are summed outside of the manual region.
    parameters = tuple(jnp.broadcast_to(value, (count, 1)) for value in (scale, bias))
    ring = jax.custom_vjp(lambda *args: _ring_forward(axes, count, *args)[0])
    ring.defvjp(functools.partial(_ring_forward, axes, count), functools.partial(_ring_backward, axes, count))
    if axes:
        rows = PartitionSpec(axes)
        ring = jax.shard_map(ring, in_specs=rows, out_specs=rows, axis_names=set(axes), check_vma=False)
    total, image_hit, text_hit = ring(image_emb, text_emb, *parameters)
    return Contrast(total.sum() / len(image_emb), image_hit, text_hit)


def _signs(size: int, at_home: jax.Array) -> Float[Array, "b b"]:
    """Returns z: 1 on the diagonal of a device's own captions, else -1."""
    return jnp.where(at_home, 2.0 * jnp.eye(size), jnp.zeros((size, size))) - 1.0


def _passed_on(axes: tuple[str, ...], count: int, values: tuple) -> tuple:
    """Sends values to the next device, and returns those of the one before."""
    if not axes:
        return values
    ring = [(device, (device + 1) % count) for device in range(count)]
    return tuple(jax.lax.ppermute(value, axes, ring) for value in values)


def _ring_forward(
    axes: tuple[str, ...], count: int, x: jax.Array, y: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple]:
    """Returns B times eq. (2) of one device's images with the captions of all ``count`` devices, and its hits.

    Scale and bias are [1, 1], the loss too; hits are bool[b] of the device's b images and captions.
    """

    def turn(carry: tuple, index: jax.Array) -> tuple[tuple, None]:
        captions, column_max, row_max, own, total = carry
        logits = scale * (x @ captions.T) + bias
        own = jnp.where(index == 0, jnp.diagonal(logits), own)
        row_max, column_max = jnp.maximum(row_max, logits.max(axis=1)), jnp.maximum(column_max, logits.max(axis=0))
        total = total - jnp.sum(jax.nn.log_sigmoid(_signs(len(x), index == 0) * logits))
        return (*_passed_on(axes, count, (captions, column_max)), row_max, own, total), None

    least = jnp.full(len(x), -jnp.inf)
    start = y, least, least, least, jnp.zeros((1, 1))
    (_, column_max, row_max, own, total), _ = jax.lax.scan(turn, start, jnp.arange(count))
    return (total, own >= row_max, own >= column_max), (x, y, scale, bias)


def _ring_backward(
    axes: tuple[str, ...], count: int, saved: tuple, cotangents: tuple
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Eq. (4). The gradients of captions travel with them, and are at home after a full turn."""
    x, y, scale, bias = saved

    def turn(carry: tuple, index: jax.Array) -> tuple[tuple, None]:
        captions, of_captions, of_x, of_scale, of_bias = carry
        similarity, signs = x @ captions.T, _signs(len(x), index == 0)
        grads = -signs * jax.nn.sigmoid(-signs * (scale * similarity + bias)) * cotangents[0]
        of_x = of_x + scale * (grads @ captions)
        of_captions = of_captions + scale * (grads.T @ x)
        of_scale, of_bias = of_scale + jnp.sum(grads * similarity), of_bias + jnp.sum(grads)
        return (*_passed_on(axes, count, (captions, of_captions)), of_x, of_scale, of_bias), None

    start = (y, *(jnp.zeros_like(value) for value in (y, x, scale, bias)))
    (_, of_y, of_x, of_scale, of_bias), _ = jax.lax.scan(turn, start, jnp.arange(count))
    return of_x, of_y, of_scale, of_bias
