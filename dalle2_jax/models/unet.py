"""The one U-Net of decoder and upsamplers: the ADM/GLIDE family.

Dhariwal & Nichol 2021 (ADM), section 3 and appendix: residual blocks conditioned on the time
embedding, up- and downsampling inside residual blocks, attention at chosen resolutions with a
fixed width a head. Nichol et al. 2021 (GLIDE), section 4.1: the context's keys and values joined
to each attention. Ramesh et al. 2022 (unCLIP), appendix C: the decoder, and upsamplers without
any attention. It does not depend on a noise schedule: it maps (x, t, conditioning) to an image.
"""

from dataclasses import dataclass
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dalle2_jax.errors import UserError, choose
from dalle2_jax.models import linear
from dalle2_jax.models.attention import ContextAttention, CrossAttention
from dalle2_jax.models.layers import (
    Dropout,
    GroupNorm,
    TimeMLP,
    average_pool,
    fold_patches,
    unfold_patches,
    upsample_nearest,
)
from dalle2_jax.models.remat import block_input, policy_name, rematerialised
from dalle2_jax.ranges import Depth, Range, Side, Width

_MAX_LEVELS = 12


@dataclass(frozen=True)
class UNetConfig:
    """A U-Net's shape.

    ``image_size`` and ``attention_resolutions`` together determine the levels with attention:
    level l of a network built for side ``image_size`` has maps of side
    image_size / patch_size / 2^l, and it attends where that side is in ``attention_resolutions``.
    The levels are then fixed: an image of another size (a crop, or the full size after training
    on crops) uses the same ones.

    Raises:
      UserError: no levels, an image that the levels or patches do not divide, or channels that norm_groups or the heads
        do not divide.
    """

    image_size: Side = 64
    in_channels: Annotated[int, Range(1, 1_000)] = 3
    out_channels: Annotated[int, Range(1, 1_000)] = 3  # 6 with a learned variance
    channels: Width = 192
    channel_mult: tuple[Annotated[int | float, Range(0, 100, exclusive_min=True)], ...] = (1, 2, 3, 4)
    num_res_blocks: Depth = 3
    attention_resolutions: tuple[Side, ...] = (32, 16, 8)
    head_channels: Width = 64
    num_heads: Depth | None = None  # the same number of heads on every level, instead of head_channels
    context_dim: Width | None = None  # width of the context tokens of each attention
    context_attention: str = "joined"  # "joined" to the image's own keys (GLIDE), or "cross" attention after its own
    scale_shift: bool = True  # False: the time embedding is only added (Karlo's upsamplers)
    resblock_updown: bool = True  # False: a strided convolution down, nearest + convolution up
    dropout: Annotated[float, Range(0, 1, exclusive_max=True)] = 0.0
    middle_attention: bool = True
    emb_dim: Width | None = None  # width of the time embedding; 4 * channels if None
    input_skip: bool = False  # adds shares of the input to the output, learned from the time embedding
    patch_size: Side = 1  # images are folded, patch x patch pixels to a position: space to depth, and back
    norm_groups: Width = 32
    remat: str = "none"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        choose("context_attention", self.context_attention, dict.fromkeys(("joined", "cross")))
        if not 1 <= len(self.channel_mult) <= _MAX_LEVELS:
            levels = len(self.channel_mult)
            raise UserError(f"channel_mult has {levels} levels: give 1 to {_MAX_LEVELS} factors, as (1, 2, 3, 4)")
        if self.image_size % self.stride:
            raise UserError(
                f"image_size {self.image_size} is not a multiple of {self.stride}, as patch_size {self.patch_size} and "
                f"the {len(self.channel_mult)} levels of channel_mult need: change one of them"
            )
        if self.input_skip and self.in_channels % self.out_channels and not self.has_mask:
            raise UserError(
                f"input_skip adds images: in_channels {self.in_channels} must be a multiple of "
                f"out_channels {self.out_channels}, or one more for a mask after the second image"
            )
        policy_name(self.remat)
        for level in range(len(self.channel_mult)):
            channels = self.level_channels(level)
            if channels < 1:
                raise UserError(f"channel_mult {self.channel_mult[level]} leaves no channel on level {level}: raise it")
            if channels % self.norm_groups:
                raise UserError(
                    f"{channels} channels on level {level} are not divisible by norm_groups {self.norm_groups}"
                )
            attends = self.attends(level) or (self.middle_attention and level == len(self.channel_mult) - 1)
            if attends and channels % (self.num_heads or self.head_channels):
                raise UserError(
                    f"{channels} channels on level {level} are not divisible by "
                    + (f"{self.num_heads} heads" if self.num_heads else f"head_channels {self.head_channels}")
                )

    @property
    def has_mask(self) -> bool:
        """Whether a channel of the input, after the second image, is a mask: the number of channels tells."""
        return self.in_channels > 2 * self.out_channels and self.in_channels % self.out_channels == 1

    @property
    def time_dim(self) -> int:
        """Width of the time embedding, and of ``emb``."""
        return 4 * self.channels if self.emb_dim is None else self.emb_dim

    @property
    def stride(self) -> int:
        """The height and width of images must be multiples of it."""
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)

    def level_channels(self, level: int) -> int:
        """Channels on a level."""
        return int(self.channels * self.channel_mult[level])

    def attends(self, level: int) -> bool:
        """Whether a level has attention."""
        return (self.image_size // self.patch_size) // 2**level in self.attention_resolutions

    def heads(self, channels: int) -> int:
        """Heads of an attention over so many channels."""
        return channels // self.head_channels if self.num_heads is None else self.num_heads


class ResBlock(nn.Module):
    """norm, SiLU, (resample), conv, + time, norm, SiLU, dropout, zero conv; plus the (resampled) input.

    ``emb`` has been through its SiLU: every block would repeat the same one. Params: ``norm_1``,
    ``conv_1``, ``emb_proj``, ``norm_2``, ``conv_2``, and ``skip`` (1x1) where the width changes.
    """

    config: UNetConfig
    features: int
    train: bool
    resample: str | None = None  # "up" or "down", by two

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], emb: Float[Array, "B E"]) -> Float[Array, "B h w D"]:
        config = self.config
        x = block_input(x)
        conv = {"kernel_size": (3, 3), "padding": 1, "dtype": config.dtype}
        h = nn.silu(GroupNorm(config.norm_groups, config.dtype, name="norm_1")(x))
        if self.resample == "up":
            h, x = upsample_nearest(h), upsample_nearest(x)
        elif self.resample == "down":
            h, x = average_pool(h, 2), average_pool(x, 2)
        h = linear.Conv(self.features, **conv, name="conv_1")(h)
        width = 2 * self.features if config.scale_shift else self.features
        shift = linear.Dense(width, dtype=config.dtype, name="emb_proj")(emb)[:, None, None, :]
        norm = GroupNorm(config.norm_groups, config.dtype, name="norm_2")
        if config.scale_shift:
            scale, shift = jnp.split(shift, 2, axis=-1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + shift)
        h = Dropout(config.dropout, self.train)(nn.silu(h))
        h = linear.Conv(self.features, **conv, kernel_init=nn.initializers.zeros, name="conv_2")(h)
        if x.shape[-1] != self.features:
            x = linear.Conv(self.features, (1, 1), dtype=config.dtype, name="skip")(x)
        return x + h


class CrossAttentionBlock(nn.Module):
    """x + attention(norm(x), context): queries from the features, keys and values from the context.

    The context is the caption's states and the image tokens. Params: ``norm`` and CrossAttention's under ``attn``.
    """

    config: UNetConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], context: Float[Array, "B S Dc"], context_mask: Bool[Array, "B S"] | None
    ) -> Float[Array, "B H W C"]:
        config = self.config
        h = GroupNorm(config.norm_groups, config.dtype, name="norm")(x)
        heads = config.heads(x.shape[-1])
        return x + CrossAttention(heads, config.dtype, name="attn")(h, context, context_mask)


class AttentionBlock(nn.Module):
    """x + attention(norm(x), context). Params: ``norm`` and ContextAttention's under ``attn``.

    With "cross", x <- x + attention(norm(x)), and a `CrossAttentionBlock` follows. Params: also those under ``cross``.
    """

    config: UNetConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        context: Float[Array, "B S Dc"] | None,
        context_mask: Bool[Array, "B S"] | None,
    ) -> Float[Array, "B H W C"]:
        config, x = self.config, block_input(x)
        h = GroupNorm(config.norm_groups, config.dtype, name="norm")(x)
        heads = config.heads(x.shape[-1])
        attention = ContextAttention(heads, config.dtype, name="attn")
        if context is None or config.context_attention == "joined":
            return x + attention(h, context, context_mask)
        return CrossAttentionBlock(config, name="cross")(x + attention(h, None, None), context, context_mask)


class UNet(nn.Module):
    """(x, t, conditioning) -> an image of x's size. At initialisation the output is exactly zero.

    Params, level l from 0 at full size, block i from 0 in the order in which they run:
    ``conv_in``, ``time_mlp``, ``down_{l}_{i}``, ``down_{l}_{i}_attn``, ``down_{l}_sample``,
    ``mid_0``, ``mid_attn``, ``mid_1``, ``up_{l}_{i}``, ``up_{l}_{i}_attn``, ``up_{l}_sample``
    (on level l, to level l - 1), ``norm_out``, ``conv_out``, ``input_skip`` if the config has it,
    and ``noise_mlp`` if it is made with a ``noise_level``. Dropout draws from
    the rng collection "dropout" when ``train``.
    """

    config: UNetConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W Cin"],
        t: Int[Array, "B"],
        emb: Float[Array, "B E"] | None = None,
        context: Float[Array, "B S Dc"] | None = None,
        context_mask: Bool[Array, "B S"] | None = None,
        train: bool = False,
        noise_level: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B H W Cout"]:
        """Runs the network.

        Args:
          x: the noised image in [-1, 1], with conditioning images concatenated to its channels.
          t: original timesteps, 0..T-1.
          emb: added to the time embedding, [B, config.time_dim].
          context: tokens joined to the keys and values of every attention; given if and only if
            the config has a context_dim.
          context_mask: true where a context token is visible; with None all are.
          train: whether dropout is on.
          noise_level: noise level of a conditioning image; embedded as t is, by an MLP of its own.

        Returns:
          float32[B, H, W, out_channels].

        Raises:
          UserError: a size that is not a multiple of config.stride, or a context where none is
            expected or the reverse.
        """
        config = self.config
        self._check(x, context)
        step = TimeMLP(config.channels, config.time_dim, config.dtype, name="time_mlp")(t)
        if emb is not None:
            step = step + emb.astype(config.dtype)
        if noise_level is not None:
            step = step + TimeMLP(config.channels, config.time_dim, config.dtype, name="noise_mlp")(noise_level)
        step = nn.silu(step)
        if context is not None:
            context = context.astype(config.dtype)
        h = fold_patches(x.astype(config.dtype), config.patch_size)
        h = linear.Conv(config.level_channels(0), (3, 3), padding=1, dtype=config.dtype, name="conv_in")(h)
        h, skips = self._down(h, step, context, context_mask, train)
        h = self._res("mid_0", h, step, train)
        if config.middle_attention:
            h = self._attend("mid", h, context, context_mask)
        h = self._res("mid_1", h, step, train)
        h = self._up(h, skips, step, context, context_mask, train)
        h = nn.silu(GroupNorm(config.norm_groups, config.dtype, name="norm_out")(h))
        out = config.out_channels * config.patch_size**2
        zeros = nn.initializers.zeros
        h = linear.Conv(out, (3, 3), padding=1, dtype=config.dtype, kernel_init=zeros, name="conv_out")(h)
        h = unfold_patches(h, config.patch_size).astype(jnp.float32)
        return h + self._input_share(x, step) if config.input_skip else h

    def _input_share(self, x: jax.Array, step: jax.Array) -> jax.Array:
        """What a network need not learn to copy: at little noise, x_0 is nearly x_t (Karras et al. 2022, eq. 7).

        There c_skip is a function of the noise; here it is learned, one for each input channel but the mask.
        """
        config = self.config
        if config.has_mask:
            x = jnp.delete(x, 2 * config.out_channels, axis=-1)
        zeros = nn.initializers.zeros
        share = linear.Dense(x.shape[-1], dtype=config.dtype, kernel_init=zeros, name="input_skip")(step)
        shared = share.astype(jnp.float32)[:, None, None, :] * x.astype(jnp.float32)
        return shared.reshape(*x.shape[:3], -1, config.out_channels).sum(axis=3)

    def _down(
        self,
        h: jax.Array,
        step: jax.Array,
        context: jax.Array | None,
        context_mask: jax.Array | None,
        train: bool,
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Every block's output is a skip, the first convolution's and the downsamplers' too."""
        config, skips = self.config, [h]
        last = len(config.channel_mult) - 1
        for level in range(last + 1):
            for i in range(config.num_res_blocks):
                h = self._res(f"down_{level}_{i}", h, step, train, config.level_channels(level))
                if config.attends(level):
                    h = self._attend(f"down_{level}_{i}", h, context, context_mask)
                skips.append(h)
            if level < last:
                h = self._sample(f"down_{level}_sample", h, step, train, "down")
                skips.append(h)
        return h, skips

    def _up(
        self,
        h: jax.Array,
        skips: list[jax.Array],
        step: jax.Array,
        context: jax.Array | None,
        context_mask: jax.Array | None,
        train: bool,
    ) -> jax.Array:
        """One block more a level than on the way down: it takes the skip of the level's own input."""
        config = self.config
        for level in reversed(range(len(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self._res(f"up_{level}_{i}", h, step, train, config.level_channels(level))
                if config.attends(level):
                    h = self._attend(f"up_{level}_{i}", h, context, context_mask)
            if level:
                h = self._sample(f"up_{level}_sample", h, step, train, "up")
        return h

    def _res(
        self,
        name: str,
        h: jax.Array,
        step: jax.Array,
        train: bool,
        features: int | None = None,
        resample: str | None = None,
    ) -> jax.Array:
        block = rematerialised(ResBlock, self.config.remat)
        return block(self.config, features or h.shape[-1], train, resample, name=name)(h, step)

    def _attend(self, name: str, h: jax.Array, context: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        block = rematerialised(AttentionBlock, self.config.remat)
        return block(self.config, name=f"{name}_attn")(h, context, mask)

    def _sample(self, name: str, h: jax.Array, step: jax.Array, train: bool, direction: str) -> jax.Array:
        if self.config.resblock_updown:
            return self._res(name, h, step, train, resample=direction)
        strides = 1
        if direction == "up":
            h = upsample_nearest(h)
        else:
            strides = 2
        conv = linear.Conv(h.shape[-1], (3, 3), strides=strides, padding=1, dtype=self.config.dtype, name=name)
        return conv(h)

    def _check(self, x: jax.Array, context: jax.Array | None) -> None:
        config = self.config
        if x.shape[1] % config.stride or x.shape[2] % config.stride:
            got = f"{x.shape[1]}x{x.shape[2]}"
            raise UserError(f"a {got} image does not fit the U-Net: its sides must be multiples of {config.stride}")
        if x.shape[3] != config.in_channels:
            raise UserError(f"the U-Net's in_channels is {config.in_channels} but its input has {x.shape[3]} channels")
        if (context is None) != (config.context_dim is None):
            given = "no context" if context is None else "a context"
            raise UserError(f"the U-Net's context_dim is {config.context_dim} but {given} is given")
