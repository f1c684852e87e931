"""One checkpoint on disk: written and read by orbax, which is imported here alone, with a digest of every file.

`read` reads packed checkpoints too (`workdir.packed`).

A digest that differs, or a file that is missing, proves damage. Anything else that fails while reading proves nothing:
a permission, a full memory or a network disk that is away may be as it was in a minute.
"""

import concurrent.futures
import errno
import gc
import os
import pathlib
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from dalle2_jax.errors import SystemWarning, UserError
from dalle2_jax.workdir import digests, packed

LEAST_SLICE = 2**20
"""Bytes: of an array that many devices hold alike each writes a part, unless parts are smaller than this. Cutting one
is a dispatch, for which the run waits: two to five times as long on eight devices (benchmarks/checkpoint.py)."""

GRACE = 0.5
"""Seconds given to the threads that still read a damaged checkpoint, or still write one of which a file failed."""


def start_writing(path: pathlib.Path, trees: Mapping[str, Any], data_state: Mapping[str, Any], lean: bool) -> Any:
    """Starts writing a checkpoint, over one that is there, and returns as soon as the arrays were copied.

    Args:
      path: the folder to make.
      trees: by their names.
      data_state: the position in the data.
      lean: for numpy arrays that nobody changes until all is written: they are neither copied nor compressed, each of
        which takes as much memory again.

    Returns:
      An object whose ``result()`` waits for the end and raises what went wrong.
    """
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = LEAST_SLICE
    if lean:
        context.memory.deepcopy_host_arrays = False
        context.array.saving.use_compression = False
    with context:
        return ocp.save_checkpointables_async(
            cast(Any, path), dict(trees), overwrite=True, custom_metadata={"data_state": dict(data_state)}
        )


_PASSING = (
    *(os.strerror(code) for code in (errno.EACCES, errno.EPERM, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)),
    *(os.strerror(code) for code in (errno.ETIMEDOUT, errno.ESTALE, errno.EBUSY, errno.EAGAIN)),
    *("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "PERMISSION_DENIED"),
)
"""Parts of messages of errors that prove no damage; tensorstore raises them as ValueError."""


class _Failure(NamedTuple):
    """Why a checkpoint could not be loaded, without the exception, which would keep the arrays in memory."""

    reason: str
    may_pass: bool


def read(path: pathlib.Path, requested: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a checkpoint's trees and data position.

    One process compares the files with their digests while it reads the arrays; several do so before, each for a part.

    Raises:
      digests.Damaged: it is proven that the checkpoint is damaged.
      UserError: it cannot be read, and nothing proves that it is damaged; or its arrays are not the requested ones; or
        it is packed and lacks a tree.
    """
    if packed.is_packed(path):
        packed.check_trees(path, requested)
    try:
        if not digests.verifying():
            known, loaded = None, _load(path, requested)
        elif jax.process_count() > 1:
            known, loaded = _check_together(path, requested), _load(path, requested)
        else:
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                checking = pool.submit(digests.check, path, requested)
                loaded = _load(path, requested)
                known = checking.result()
        if isinstance(loaded, _Failure):
            if known:
                digests.check(path)  # of the other trees, too
                if not loaded.may_pass:
                    raise _unfit(path, loaded.reason)
            elif not loaded.may_pass:
                digests.of_folder(path)  # OSError where a file cannot be read to its end
                raise digests.Damaged(loaded.reason)
            raise _unreadable(path, loaded.reason)
    except (OSError, MemoryError) as error:
        raise _unreadable(path, _reason(error)) from error
    if known is False and jax.process_index() == 0:
        message = f"{path} is of an earlier version and has no digests: damage may go unnoticed"
        warnings.warn(message, SystemWarning, stacklevel=2)
    return loaded


def _check_together(path: pathlib.Path, names: Iterable[str]) -> bool:
    """Calls `digests.check` with a share of the files in each process, and ends alike in all of them."""
    outcome: bool | Exception
    try:
        outcome = digests.check(path, names, (jax.process_index(), jax.process_count()))
    except (digests.Damaged, OSError) as error:
        outcome = error
    verdict = 2 if isinstance(outcome, digests.Damaged) else int(isinstance(outcome, OSError))
    worst = int(multihost_utils.process_allgather(np.array(verdict, np.int32)).max())
    if worst > verdict:
        raise digests.Damaged("as another process found") if worst == 2 else OSError("another process cannot read it")
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _load(path: pathlib.Path, requested: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | _Failure:
    """Returns a checkpoint's trees and data position, or why they cannot be loaded."""
    with warnings.catch_warnings():
        # orbax forgets its own coroutines when a file is damaged; collected here, their warnings are silenced
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        try:
            if packed.is_packed(path):
                return packed.load(path, requested), {}
            from orbax.checkpoint import v1 as ocp

            trees = ocp.load_checkpointables(cast(Any, path), dict(requested))
            metadata = cast(Any, ocp.checkpointables_metadata(cast(Any, path)).custom_metadata)
            return dict(trees), metadata["data_state"]
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
            failure = _Failure(_reason(error), _may_pass(error))
        time.sleep(GRACE)
        gc.collect()
    return failure


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an exception and those that led to it, the first one last."""
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__ or each.__context__


def _may_pass(error: Exception) -> bool:
    """Whether an error may pass: one of memory or permissions, not of the files' content."""
    missing = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
    return any(
        isinstance(each, MemoryError)
        or (isinstance(each, OSError) and not isinstance(each, missing))
        or any(words in str(each) for words in _PASSING)
        for each in _chain(error)
    )


def _reason(error: BaseException) -> str:
    """Returns the first line of the exception that led to this one."""
    first = list(_chain(error))[-1]
    return (str(first) or type(first).__name__).splitlines()[0][:120]


def _unreadable(path: pathlib.Path, reason: str) -> UserError:
    return UserError(
        f"checkpoint {path} cannot be read now ({reason}); it was left as it is. Run the same command again "
        "when that has passed, or move the folder away to use the checkpoint before it"
    )


def _unfit(path: pathlib.Path, reason: str) -> UserError:
    first = reason.partition(". ")[0]  # advice about orbax follows
    return UserError(
        f"checkpoint {path} is undamaged, but its arrays are not the expected ones ({first}): use the version and the "
        "optimizer that wrote it, or train in another --workdir that starts from its weights (--config.init_from)"
    )
