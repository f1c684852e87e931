"""A diffusion stage whose network is a formula, so that its expected output can be computed by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax import rng
from dalle2_jax.diffusion.variance import LEARNED
from dalle2_jax.stages import DiffusionConfig, SamplingConfig
from dalle2_jax.stages.diffusion import DiffusionStage

DIM = 4


@dataclasses.dataclass(frozen=True)
class Probe(DiffusionStage):
    """Conditioned on image and text of ``DIM`` numbers; records the rows, drops and training of each trace."""

    diffusion: DiffusionConfig = DiffusionConfig("x0", num_steps=100)
    sampling: SamplingConfig = SamplingConfig(steps="t:50", clip_sample=None)
    name: str = "probe"
    seen: list = dataclasses.field(default_factory=list, compare=False)

    drop_rates = {"image": 0.1, "text": 0.5}

    def init_params(self, key):
        return {"kernel": 1 + 0.1 * jax.random.normal(key, (2, 1))}

    def example(self, stats, key, batch):
        return batch["x"], {"image": batch["image"], "text": batch["text"]}

    def sample_shape(self, condition):
        return (DIM,)

    def bind(self, params, condition, drops, dropout_key):
        image, text = (jnp.where(drops[name][:, None], 0.5, condition[name]) for name in ("image", "text"))
        self.seen.append({**drops, "rows": len(image), "training": dropout_key is not None})
        gain, conditioning = params["kernel"]

        def network(x_t, t):
            mean = 0.5 * gain[None] * x_t + conditioning[None] * (image + (1 + image) * text)
            mean = mean * (1 + 0.01 * t.astype(jnp.float32))[:, None]
            return jnp.concatenate([mean, jnp.tanh(text)], axis=-1) if self.diffusion.variance in LEARNED else mean

        return network


def params(gain=1.0, conditioning=1.0):
    """Returns the probe's parameters: the weights of x_t and of its conditioning."""
    return {"kernel": jnp.array([[gain], [conditioning]], jnp.float32)}


def batch(size, seed=0):
    """Returns random examples and their conditioning."""
    rows = np.random.default_rng(seed).standard_normal((3, size, DIM), np.float32)
    return dict(zip(("x", "image", "text"), rows, strict=True))


def condition(size, seed=0):
    """Returns the conditioning of random examples."""
    return {name: jnp.asarray(rows) for name, rows in batch(size, seed).items() if name != "x"}


def keys(size, seed=0):
    """One a sample."""
    return rng.per_image(rng.root(seed), jnp.arange(size, dtype=jnp.int32))
