"""Loads feature networks: imported ones from their folder, CLIP from a system."""

import os
from pathlib import Path

from dalle2_jax import compilation
from dalle2_jax.errors import UserError, choose
from dalle2_jax.evaluation.features import clip
from dalle2_jax.evaluation.features.encoders import make_network, names_in
from dalle2_jax.evaluation.features.network import FeatureNetwork
from dalle2_jax.pretrained import find_system
from dalle2_jax.system import load as stages
from dalle2_jax.system.system import System
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.weights.features import folder


def load(path: str | os.PathLike[str] | System, name: str | None = None) -> FeatureNetwork:
    """Loads the network whose features image measures compare, on all devices.

    Args:
      path: a folder that ``dalle2 weights import`` wrote, or a system with a CLIP: its folder, the name of an
        included one, or loaded.
      name: of the network, where the folder gives several: that of torchvision's VGG16 gives "vgg16_fc7" (the default)
        and "vgg16".

    Raises:
      UserError: there is no such network; the message has the command that imports one.
    """
    if isinstance(path, System):
        if "clip" not in path.stages:
            raise UserError(missing(path.path))
        return clip.from_stage(path.stages["clip"], path.mesh)
    root, mesh = find_system(path), make_mesh(MeshConfig())
    compilation.enable_compilation_cache()
    if folder.holds_network(root):
        stored = folder.read(root)
        names = names_in(stored.name)
        if not names:
            raise UserError(f"{root} holds {stored.name}, which measures distances only: give it to LPIPS")
        chosen = choose("network", name or names[0], dict(zip(names, names, strict=True)))
        return make_network(chosen, stored.variables, stored.fingerprint, mesh)
    if "clip" not in stages.started_stages(root):
        raise UserError(missing(root))
    return clip.from_stage(stages.load_stage(root, "clip", mesh), mesh)


def missing(root: Path) -> str:
    """Returns the message that a folder holds no feature network, with the command that imports one."""
    command = f"`dalle2 weights import auto FILE {root}`"
    return f"{root} holds no feature network: import one with {command}, where FILE is its torch or safetensors file"
