"""dalle2_jax: the complete DALL-E 2 (unCLIP) text-to-image system in JAX.

Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents", arXiv 2204.06125.

    import dalle2_jax as d2

    system = d2.load("runs/demo")
    system.text2image("a large red circle", num=4).save("out")

Names are imported when they are first used: ``import dalle2_jax`` alone loads neither JAX nor NumPy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalle2_jax import data as data
    from dalle2_jax import diffusion as diffusion
    from dalle2_jax import stages as stages
    from dalle2_jax.config.experiment import Experiment as Experiment
    from dalle2_jax.config.experiment import experiment as experiment
    from dalle2_jax.errors import ConfigError as ConfigError
    from dalle2_jax.errors import ContractError as ContractError
    from dalle2_jax.errors import DataError as DataError
    from dalle2_jax.errors import SystemWarning as SystemWarning
    from dalle2_jax.errors import UsageError as UsageError
    from dalle2_jax.errors import UserError as UserError
    from dalle2_jax.errors import WeightsError as WeightsError
    from dalle2_jax.evaluation.figures import Evaluation as Evaluation
    from dalle2_jax.evaluation.run import evaluate as evaluate
    from dalle2_jax.planning.planner import plan as plan
    from dalle2_jax.planning.result import Plan as Plan
    from dalle2_jax.planning.search import search_plans as search_plans
    from dalle2_jax.report import write_report as write_report
    from dalle2_jax.run import train as train
    from dalle2_jax.system.images import Images as Images
    from dalle2_jax.system.system import System as System
    from dalle2_jax.system.system import load as load
    from dalle2_jax.weights.importer import import_weights as import_weights

__version__ = "0.2.0"

_MODULES = ("data", "diffusion", "stages")
_NAMES = {
    "Evaluation": "evaluation.figures:Evaluation",
    "Experiment": "config.experiment:Experiment",
    "Images": "system.images:Images",
    "Plan": "planning.result:Plan",
    "System": "system.system:System",
    "evaluate": "evaluation.run:evaluate",
    "experiment": "config.experiment:experiment",
    "import_weights": "weights.importer:import_weights",
    "load": "system.system:load",
    "plan": "planning.planner:plan",
    "search_plans": "planning.search:search_plans",
    "train": "run:train",
    "write_report": "report:write_report",
    "ConfigError": "errors:ConfigError",
    "ContractError": "errors:ContractError",
    "DataError": "errors:DataError",
    "SystemWarning": "errors:SystemWarning",
    "UsageError": "errors:UsageError",
    "UserError": "errors:UserError",
    "WeightsError": "errors:WeightsError",
}
"""Name -> the module of this package that defines it, and its name there."""

__all__ = ["__version__", *_MODULES, *_NAMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name in _MODULES:
        return importlib.import_module(f"dalle2_jax.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'dalle2_jax' has no attribute {name!r}")
    module, _, attribute = _NAMES[name].partition(":")
    value = getattr(importlib.import_module(f"dalle2_jax.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
