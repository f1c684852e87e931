"""Import and export of public checkpoints, and packing of trained systems.

`import_weights` writes a public checkpoint as stages of a system, `inspect` describes one, and `export` writes a system
in the layout of another library. `pack` writes a small copy of a system. Each family of checkpoints has a module, which
detects it (by keys, shapes and config files), determines the stage's config, and has a conversion table (``rules``) for
its tensors.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalle2_jax.weights.exporter import ExportReport, export
    from dalle2_jax.weights.importer import ImportedStage, ImportReport, import_weights
    from dalle2_jax.weights.inspection import ComponentSummary, Inspection, inspect
    from dalle2_jax.weights.packing.card import PackedStage
    from dalle2_jax.weights.packing.packer import PackReport, pack

__all__ = [
    "ComponentSummary",
    "ExportReport",
    "ImportReport",
    "ImportedStage",
    "Inspection",
    "PackReport",
    "PackedStage",
    "export",
    "import_weights",
    "inspect",
    "pack",
]

_MODULES = {
    "ComponentSummary": "inspection",
    "ExportReport": "exporter",
    "ImportReport": "importer",
    "ImportedStage": "importer",
    "Inspection": "inspection",
    "PackReport": "packing.packer",
    "PackedStage": "packing.card",
    "export": "exporter",
    "import_weights": "importer",
    "inspect": "inspection",
    "pack": "packing.packer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
