"""FID, KID and precision and recall of given features, next to torch-fidelity and pytorch-fid in another interpreter.

    OMP_NUM_THREADS=1 python benchmarks/frechet.py --peer PYTHON [--images 2500] [--dim 2048]

Prints one JSON line: seconds and CPU seconds of each measure in both, and the relative difference of its values.
"""

import os
import time
from collections.abc import Callable

from common import emit, program, result

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.evaluation.distances import Statistics, frechet_distance, kid, precision_recall

FEATURES = """
import numpy as np
def feature_sets(images, dim):
    random = np.random.RandomState(0)
    scale = np.exp(-np.arange(dim) / (dim / 6))
    return [np.maximum(random.normal(size=(images, dim)) * scale + shift * scale, 0) for shift in (0.2, 0.0)]
"""

PEER = (
    FEATURES
    + """
import json, sys, time, torch
from pytorch_fid.fid_score import calculate_frechet_distance
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
a, b = map(torch.from_numpy, feature_sets(*map(int, sys.argv[1:])))
of_a, of_b = map(fid_features_to_statistics, (a, b))
measures = {
    "FID": lambda: fid_statistics_to_metric(of_a, of_b, False)["frechet_inception_distance"],
    "FID of pytorch-fid": lambda: calculate_frechet_distance(*of_a.values(), *of_b.values()),
    "KID": lambda: kid_features_to_metric(a, b, verbose=False)["kernel_inception_distance_mean"],
    "precision": lambda: prc_features_to_metric(a, b, verbose=False)["precision"],
}
result = {}
for name, measure in measures.items():
    start, cpu = time.perf_counter(), time.process_time()
    value = float(measure())
    result[name] = value, time.perf_counter() - start, time.process_time() - cpu
print(json.dumps(result))
"""
)


def timed(measure: Callable[[], float]) -> tuple[float, float, float]:
    """Returns the value of a measure, its seconds and its CPU seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    value = measure()
    return value, time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    """Measures both, one after the other."""
    example = "OMP_NUM_THREADS=1 python benchmarks/frechet.py --peer .venv-parity/bin/python"
    parser = args.make_parser("python benchmarks/frechet.py", "Compares measures of features.", example)
    parser.add_argument("--peer", type=program, required=True, help="a Python that has torch-fidelity and pytorch-fid")
    parser.add_argument("--images", type=int, default=2500, help="images of each set, at least 1000")
    parser.add_argument("--dim", type=int, default=2048, help="features of each image")
    options = parser.parse_args()
    names: dict[str, Callable] = {}
    exec(FEATURES, names)
    a, b = names["feature_sets"](options.images, options.dim)
    of_a, of_b = Statistics.of(a), Statistics.of(b)
    ours = {
        "FID": timed(lambda: frechet_distance(of_a, of_b)),
        "KID": timed(lambda: kid(a, b)[0]),
        "precision": timed(lambda: precision_recall(b, a).precision),
    }
    words = [options.peer, "-W", "ignore", "-c", PEER, str(options.images), str(options.dim)]
    theirs = result(words, os.environ)
    results = {}
    for name, (expected, seconds, cpu) in theirs.items():
        value, our_seconds, our_cpu = ours[name.split()[0]]
        results[name] = {
            "seconds": round(our_seconds, 2),
            "cpu": round(our_cpu, 2),
            "peer seconds": round(seconds, 2),
            "peer cpu": round(cpu, 2),
            "difference": float(f"{abs(value / expected - 1):.1e}"),
        }
    emit(benchmark="measures of features", images=options.images, dim=options.dim, results=results)


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
