"""Where a network meets an objective: one stage a trainable part of the system."""

from dalle2_jax.stages.ar_prior import ArPriorStage, ArSamplingConfig
from dalle2_jax.stages.base import EmbeddingContract, Outputs, Stage, Variables
from dalle2_jax.stages.clip import ClipStage, EmbeddingConfig
from dalle2_jax.stages.decoder import DecoderStage
from dalle2_jax.stages.diffusion import DiffusionConfig, DiffusionStage, SamplingConfig
from dalle2_jax.stages.lora import LoraConfig, LoraStage
from dalle2_jax.stages.prior import PriorStage
from dalle2_jax.stages.upsampler import UpsamplerStage

__all__ = [
    "ArPriorStage",
    "ArSamplingConfig",
    "ClipStage",
    "DecoderStage",
    "DiffusionConfig",
    "DiffusionStage",
    "EmbeddingConfig",
    "EmbeddingContract",
    "LoraConfig",
    "LoraStage",
    "Outputs",
    "PriorStage",
    "SamplingConfig",
    "Stage",
    "UpsamplerStage",
    "Variables",
]
