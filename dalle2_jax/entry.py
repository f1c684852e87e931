"""What every front door does: one-line errors, exit codes, and the compilation cache."""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable

import jax

from dalle2_jax.types import UsageError, UserError


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that only a program's first run on a machine compiles it.

    In ``$JAX_COMPILATION_CACHE_DIR``, else in the user's cache folder.
    """
    if not jax.config.jax_compilation_cache_dir:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(base / "dalle2_jax" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def guarded(action: Callable[[], None]) -> int:
    """Runs a front door and returns its exit code.

    0, or after one line on standard error: 2 for a wrong word on the command line or in a config,
    1 for any other mistake the user can mend. Bugs keep their traceback.
    """
    try:
        action()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def parser(prog: str, description: str, example: str, **kwargs) -> argparse.ArgumentParser:
    """Returns an argument parser whose help ends with an example."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **kwargs,
    )
