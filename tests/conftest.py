"""A suite that refuses sloppiness: strict dtypes and ranks, eight devices, no key used twice."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dalle2_jax import entry

entry.enable_compilation_cache()  # as the commands do: a second run of the suite takes a fraction of the first
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture(scope="module")
def quick_programs(tmp_path_factory):
    """Compiles each program once for all runs of a file, without what makes it fast."""
    folder, least = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {folder: getattr(jax.config, folder), least: getattr(jax.config, least)}
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update(folder, str(tmp_path_factory.mktemp("programs")))
    jax.config.update(least, 0.0)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
