"""Networks whose features image measures compare (FID, KID, precision and recall, LPIPS).

    network = features.load("runs/vgg16")
    values = features.extract(network, images)
    print(network.measure_name("FD"))  # FD-VGG16

No network comes with the package: ``dalle2 weights import`` makes a folder of a published file. Only the measures of
FID's Inception have the names FID, KID and IS; those of any other network carry its name.
"""

from dalle2_jax.evaluation.features.extract import extract
from dalle2_jax.evaluation.features.loading import load
from dalle2_jax.evaluation.features.network import FeatureNetwork

__all__ = ["FeatureNetwork", "extract", "load"]
