"""The Inception score: how sure a classifier is of each image, and how evenly images spread over classes.

For the classifier's probabilities p(y|x) of an image and their mean p(y) (Salimans et al. 2016, section 4),

    IS = exp(mean_x KL(p(y|x) || p(y)))                                                         (1)

It compares images with no data set: it is 1 at least, the number of classes at most, and that of ImageNet's images for
Inception over ImageNet only.
"""

import numpy as np
from jaxtyping import Float, Float64

from dalle2_jax.errors import DataError
from dalle2_jax.evaluation.distances import blocks


def inception_score(
    logits: Float[np.ndarray, "N K"], splits: int = 10, seed: int = 2020
) -> tuple[float, Float64[np.ndarray, "S"]]:
    """Returns the mean of eq. (1) over splits, and eq. (1) of each split.

    Images are shuffled first, as torch-fidelity does for the same seed: in a split of sorted classes the score is low.

    Args:
      logits: of each image, as `FeatureNetwork.logits_of` returns them.
      splits: number of splits S.
      seed: of the shuffle.

    Raises:
      DataError: there are fewer images than splits, or logits are not finite.
    """
    values = blocks.checked(logits, "logits")
    n = len(values)
    if not 1 <= splits <= n:
        raise DataError(f"{n} images cannot be divided into {splits} splits: use more images")
    order = np.random.RandomState(seed).permutation(n)  # its stream is the same in all versions of NumPy
    scores = [_score(values[order[i * n // splits : (i + 1) * n // splits]]) for i in range(splits)]
    return float(np.mean(scores)), np.array(scores)


def _score(logits: Float[np.ndarray, "N K"]) -> float:
    """Returns eq. (1)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    mean = p.mean(axis=0)
    present = mean > 0  # a class whose probability is 0 for all images adds nothing
    divergence = (p[:, present] * (log_p[:, present] - np.log(mean[present]))).sum(axis=1)
    return float(np.exp(divergence.mean()))
