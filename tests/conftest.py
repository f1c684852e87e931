"""Configuration of the suite: strict dtypes, ranks and random keys; cheap compilation, cached on disk.

The process has eight CPU devices. ``jax.devices()`` lists one of them, and all eight in tests marked ``sharding``.
Programs are compiled without optimization, except in tests marked ``numerics``.
"""

import gc
import importlib.metadata
import os
import pathlib
import warnings

DEVICES = 8
QUICK_FLAGS = {
    # jaxlib's version: flags that shorten compilation. XLA ends the process at a flag that it does not know.
    "0.10": "--xla_cpu_use_fusion_emitters=false --xla_disable_hlo_passes=constant_folding",
    "0.12": "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE --xla_disable_hlo_passes=constant_folding,fusion-wrapper",
}
JAXLIB = ".".join(importlib.metadata.version("jaxlib").split(".")[:2])
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "dalle2_jax" / "tests"

# Set before jax is imported. Subprocesses of tests inherit all of it, with one device (see command_line.py).
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # one test process per core
    os.environ.setdefault(_name, "1")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_multi_thread_eigen=false",
        "--xla_cpu_parallel_codegen_split_count=1",  # one LLVM module a program, not one a core
        QUICK_FLAGS.get(JAXLIB, ""),
        f"--xla_force_host_platform_device_count={DEVICES}",
    ]
)

import cv2
import flax.core.scope
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
cv2.setNumThreads(0)
gc.set_threshold(50_000, 20, 20)

SLOWEST_FILES = (
    # Run first, so that all test processes end at about the same time.
    "tests/docs/test_docs.py",
    "tests/commands/test_end_to_end.py",
    "tests/training/test_step.py",
    "tests/weights/karlo/test_karlo_cascade.py",
    "tests/config/test_configs.py",
    "tests/diffusion/sampling/test_sampler.py",
    "tests/diffusion/schedule/test_objective.py",
    "tests/commands/test_faults.py",
    "tests/commands/test_finetune.py",
    "tests/commands/test_multihost.py",
    "tests/commands/test_embedded_training.py",
    "tests/commands/test_four_forms.py",
    "tests/weights/test_tuning.py",
    "tests/stages/test_ar_prior_stage.py",
    "tests/weights/families/test_laion_system.py",
    "tests/weights/karlo/test_karlo_variants.py",
    "tests/diffusion/schedule/test_likelihood.py",
    "tests/stages/test_stage_lora.py",
)


# --- number of devices ------------------------------------------------------------------------

_ALL_DEVICES = {name: getattr(jax, name) for name in ("devices", "local_devices")}
_visible = 1


def _set_visible_devices(count):
    """Limits what jax.devices, jax.local_devices and their counts return."""
    global _visible
    _visible = count


jax.devices = lambda *args, **kwargs: _ALL_DEVICES["devices"](*args, **kwargs)[:_visible]
jax.local_devices = lambda *args, **kwargs: _ALL_DEVICES["local_devices"](*args, **kwargs)[:_visible]
jax.device_count = lambda *args: len(jax.devices(*args))
jax.local_device_count = lambda *args: len(jax.local_devices(*args))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Runs before any fixture: module fixtures have the devices of the first test that uses them."""
    _set_visible_devices(DEVICES if item.get_closest_marker("sharding") else 1)
    _set_quick_compilation(item.get_closest_marker("numerics") is None)


# --- how programs are compiled ----------------------------------------------------------------

_quick = True


def _set_quick_compilation(quick):
    """Turns XLA's optimizations off or on. Programs that were compiled in the other mode are cleared."""
    global _quick
    if quick != _quick:
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.clear_caches()
    _quick = quick


# --- tracing ----------------------------------------------------------------------------------


class _JaxWithCachedShapes:
    """Stands for the module jax in ``flax.core.scope``, with a cached ``eval_shape``.

    At every ``apply`` flax traces the initializer of every parameter to compare shapes: a third of all tracing.
    """

    def __init__(self):
        self.cache = {}

    def __getattr__(self, name):
        return getattr(jax, name)

    def eval_shape(self, function, *args):
        names, cells = function.__code__.co_freevars, function.__closure__ or ()
        closure = dict(zip(names, (cell.cell_contents for cell in cells), strict=True))
        try:
            init_fn, shape, options = closure["init_fn"], closure["init_args"], closure["init_kwargs"]
            key = (init_fn, shape, tuple(options.items()))
            hash(key)
        except (KeyError, TypeError):
            return jax.eval_shape(function, *args)
        if key not in self.cache:
            self.cache[key] = jax.eval_shape(function, *args)
        return self.cache[key]


flax.core.scope.jax = _JaxWithCachedShapes()


# --- shared fixtures --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def mesh():
    """All devices along the data axis."""
    from dalle2_jax.training.sharding import MeshConfig, make_mesh

    return make_mesh(MeshConfig())


# --- order ------------------------------------------------------------------------------------


def pytest_collection_modifyitems(items):
    """Sorts the slowest files first."""
    order = {name: place for place, name in enumerate(SLOWEST_FILES)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


def pytest_collection_finish():
    """Exempts the imported modules from garbage collection: they live until the end."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Exempts what a file leaves in JAX's caches, too: a full collection of it all takes seconds."""
    if nextitem is None or nextitem.path != item.path:
        with warnings.catch_warnings():  # orbax forgets its own coroutines when a checkpoint cannot be read
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            gc.collect()
        gc.freeze()
