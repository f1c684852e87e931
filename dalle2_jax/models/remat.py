"""Rematerialisation: which activations of a network are stored for the backward pass, and which computed again.

| policy    | stored for each block                                         | computed again                |
| --------- | ------------------------------------------------------------- | ----------------------------- |
| "none"    | all activations                                               | nothing                       |
| "blocks"  | its input                                                     | the block                     |
| "dots"    | its input, results of convolutions and products with weights  | norms, activations, attention |
| "offload" | its input, in the memory of the host                          | the block                     |

Chen et al. 2016 (arXiv 1604.06174), section 4, is "blocks". No policy changes what is computed.
"""

from typing import Any, TypeVar

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from dalle2_jax.errors import choose

BLOCK_INPUT = "block_input"
"""Name of the activation that "offload" moves to the host."""

Remat = str | bool
"""Name of a policy; True is "blocks" and False "none", as configs of earlier versions have them."""

POLICIES = ("none", "blocks", "dots", "offload")

Block = TypeVar("Block", bound=type[nn.Module])


def _is_product_with_weights(primitive: Any, *args: Any, **params: Any) -> Any:
    products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive.name == "conv_general_dilated" or products(primitive, *args, **params)


def policy_name(remat: Remat) -> str:
    """Returns the name of a policy. UsageError, which offers the nearest, for an unknown one."""
    if isinstance(remat, bool):
        return "blocks" if remat else "none"
    choose("remat", remat, dict.fromkeys(POLICIES))
    return remat


def rematerialised(block: Block, remat: Remat, prevent_cse: bool = True) -> Block:
    """Returns a block's module class under a policy.

    Args:
      block: its input is named by `block_input`.
      remat: the policy.
      prevent_cse: whether XLA is kept from merging what is computed again with the first time; not needed in a scan.
    """
    policies = {
        "blocks": None,
        "dots": _is_product_with_weights,
        "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[BLOCK_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    name = policy_name(remat)
    return block if name == "none" else nn.remat(block, prevent_cse=prevent_cse, policy=policies[name])


def block_input(x: jax.Array) -> jax.Array:
    """Names the input of a block for the policy "offload"."""
    return checkpoint_name(x, BLOCK_INPUT)
