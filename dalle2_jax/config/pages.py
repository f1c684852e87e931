"""Reads config pages: Python files that define ``get_config`` and, for sweeps, ``sweep``."""

import itertools
import runpy
import traceback
from collections.abc import Iterator
from typing import Any

from dalle2_jax.config.shipped import find_page, page_names
from dalle2_jax.errors import UsageError, UserError

MAX_YIELDED = 10_000
"""Items taken of a generator in a config file, which may be endless."""


def call_config_page(words: str, function: str = "get_config", absent: Any = None) -> Any:
    """Returns what a function of a user's config file returns; of a generator, a list.

    Args:
      words: FILE:STAGE, a Python file, or the name of a page that comes with the package, and the argument of the
        function; FILE alone calls it without one.
      function: its name.
      absent: returned where the file has no such function; if None, that is an error.

    Raises:
      UsageError: there is no such file or function, or either fails, for whatever reason.
    """
    file, colon, which = words.partition(":")
    hint = "--config is FILE:STAGE, a Python file and one of its stages"
    path = find_page(file)
    if path is None:
        raise UsageError(f"there is no config file {file!r}: {hint}; pages of the package: {', '.join(page_names())}")
    try:
        members = runpy.run_path(str(path))
        if function in members:
            result = members[function](*([which] if colon else []))
            if not isinstance(result, Iterator):
                return result
            result = list(itertools.islice(result, MAX_YIELDED + 1))
            if len(result) <= MAX_YIELDED:
                return result
            raise UsageError(f"{function} of {file} yields more than {MAX_YIELDED} items")
    except UserError as error:
        raise UsageError(str(error)) from error
    except (Exception, SystemExit) as error:  # whatever a user's program does
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f" (line {lines[-1]})" if lines else ""
        raise UsageError(f"the config file cannot be read: {file} ends in {reason}{place}; {hint}") from error
    if absent is None:
        raise UsageError(f"the config file cannot be read: {file} has no function {function}; {hint}")
    return absent
