"""Stages: a network with its objective, its conditioning and its sampling; one for each trainable part."""

from dalle2_jax.stages.ar_prior import ArPriorStage
from dalle2_jax.stages.base import Outputs, Stage, Variables, abstract_variables
from dalle2_jax.stages.clip import ClipStage, EmbeddingConfig
from dalle2_jax.stages.contract import EmbeddingContract, fingerprint
from dalle2_jax.stages.contrastive import ContrastiveConfig
from dalle2_jax.stages.decoder import DecoderStage
from dalle2_jax.stages.diffusion import DiffusionConfig, DiffusionStage
from dalle2_jax.stages.lora import LoraConfig, LoraStage
from dalle2_jax.stages.prior import PriorStage
from dalle2_jax.stages.sampling import (
    ArSamplingConfig,
    ArSamplingPlan,
    ImageSamplingConfig,
    SamplingConfig,
    SamplingPlan,
)
from dalle2_jax.stages.upsampler import UpsamplerStage

__all__ = [
    "ArPriorStage",
    "ArSamplingConfig",
    "ArSamplingPlan",
    "ClipStage",
    "ContrastiveConfig",
    "DecoderStage",
    "DiffusionConfig",
    "DiffusionStage",
    "EmbeddingConfig",
    "EmbeddingContract",
    "ImageSamplingConfig",
    "LoraConfig",
    "LoraStage",
    "Outputs",
    "PriorStage",
    "SamplingConfig",
    "SamplingPlan",
    "Stage",
    "UpsamplerStage",
    "Variables",
    "abstract_variables",
    "fingerprint",
]
