"""What an image network computes."""

from typing import NamedTuple

from jaxtyping import Array, Float


class FeatureOutputs(NamedTuple):
    """Outputs of an image network.

    Attributes:
      features: float32[B, D].
      logits: float32[B, K]; [B, 0] for a network that does not classify.
    """

    features: Float[Array, "B D"]
    logits: Float[Array, "B K"]
