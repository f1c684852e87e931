"""Low-rank changes on activations equal changed kernels, in networks with layers that no other test of LoRA has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close, differ, normal, random_variables

from dalle2_jax.models.low_rank import low_rank_changes, with_factors
from dalle2_jax.models.priors.ar_prior import ArPriorConfig, ArPriorNetwork
from dalle2_jax.models.priors.laion_prior import LaionPriorConfig, LaionPriorNetwork
from dalle2_jax.models.transformer import TextConfig
from dalle2_jax.stages import LoraConfig, LoraStage, Variables
from dalle2_jax.stages.lora import merge

CONFIG = LoraConfig(rank=2, alpha=3.0)
TEXT = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], jnp.int32), jnp.ones((2, 5), bool)
YES = jnp.ones(2, bool)


def ar_prior():
    text = TextConfig(vocab_size=11, context_length=5, width=12, layers=1, heads=2)
    config = ArPriorConfig(text, width=16, layers=2, heads=2, context_length=9, embed_dim=6, components=4, buckets=7)
    codes = jnp.array([[3, 0, 6, 1], [2, 2, 5, 4]], jnp.int32)
    return ArPriorNetwork(config), (codes, jnp.array([6, 2], jnp.int32), normal(2, 2, 6), *TEXT, ~YES)


def laion_prior():
    noised, caption = (normal(0, 2, 8), jnp.array([1, 7], jnp.int32)), (normal(1, 2, 8), normal(3, 2, 5, 8), TEXT[1])
    return LaionPriorNetwork(LaionPriorConfig(8, 2, 2, 6, 12, 5, 1000)), (*noised, *caption, ~YES, ~YES)


@dataclasses.dataclass(frozen=True)
class Inner:
    """Stands for the stage of a network."""

    name: str
    make: object

    def init(self, key):
        network, args = self.make()
        return Variables(random_variables(network, *args)["params"], {})

    constant_stats = ()


@pytest.mark.parametrize("make", [ar_prior, laion_prior])
def test_a_network_with_factors_is_the_network_of_changed_kernels(make):
    (network, args), base = make(), Inner("inner", make).init(None).params
    shapes = jax.eval_shape(LoraStage(Inner("inner", make), CONFIG).init, jax.random.key(0)).params
    noise = np.random.default_rng(1)
    factors = jax.tree.map(lambda leaf: jnp.asarray(0.1 * noise.standard_normal(leaf.shape, np.float32)), shapes)
    assert len(jax.tree.leaves(factors)) >= 8

    @jax.jit
    def apply(params):
        with low_rank_changes(CONFIG.alpha / CONFIG.rank):
            return network.apply({"params": params}, *args)

    changed = apply(with_factors(base, factors))
    close(changed, apply(merge(base, factors, CONFIG)), 1e-4)
    differ(changed, apply(base))
