"""CLIP's image tower as a feature network."""

from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from dalle2_jax.data.images.decoding import preprocess
from dalle2_jax.evaluation.features.network import FeatureNetwork
from dalle2_jax.evaluation.features.placement import place
from dalle2_jax.stages import ClipStage, EmbeddingContract
from dalle2_jax.system.loaded_stage import LoadedStage


def from_stage(clip: LoadedStage, mesh: Mesh) -> FeatureNetwork:
    """Returns the feature network of a loaded CLIP: its image embeddings, in the space of the embedding contract.

    Images are preprocessed on the host as the contract specifies, and give the embeddings of `System.embed_image`.
    """
    stage, contract = cast(ClipStage, clip.stage), cast(EmbeddingContract, clip.contract)
    side = stage.model.tower.image_size
    program = jax.jit(stage.encode_image)

    def encode(images: UInt8[np.ndarray, "B H W 3"]) -> jax.Array:
        prepared = np.stack([preprocess(np.asarray(image), contract.preprocessing, side) for image in images])
        return program(clip.variables, place(prepared, mesh))

    return FeatureNetwork("clip", "CLIP", side, 1, contract.dim, 0, contract.clip, encode, devices=mesh.size)
