"""Imports every module, trains a tiny system and samples from it: a check that a set of versions works together.

python .ci/smoke.py
"""

import importlib
import json
import pathlib
import pkgutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = "tests/support/tiny_system.py"
SHORT = ("--config.total_steps=4", "--config.checkpoint_every=4")


def run(*arguments: object) -> None:
    """Runs a script of the repository with this Python.

    Raises:
      CalledProcessError: it failed.
    """
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True)


def main() -> None:
    """Imports every module, trains three tiny stages, and samples from them."""
    import dalle2_jax

    for module in pkgutil.walk_packages(dalle2_jax.__path__, "dalle2_jax."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    with tempfile.TemporaryDirectory() as folder:
        system, out = pathlib.Path(folder, "system"), pathlib.Path(folder, "out")
        for stage in ("clip", "prior", "decoder"):
            run("train.py", "--config", f"{CONFIG}:{stage}", "--workdir", system, *SHORT)
        run("sample.py", "text2image", "--system", system, "--out", out, "--prompt", "a large red circle")
        assert json.loads((out / "samples.json").read_text())
        assert (out / "grid.png").is_file()
    print(f"Python {sys.version.split()[0]} and jax {importlib.import_module('jax').__version__}: ok")


if __name__ == "__main__":
    main()
