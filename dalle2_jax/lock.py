"""Locks on folders that one process at a time may write, and hidden folders that are removed if their writer dies.

A lock is a file on which its holder has an ``flock`` and whose modification time the holder renews every `BEAT`
seconds; its content names the holder. The kernel releases the lock of a process that was killed, so that the next run
can take it. On network disks ``flock`` may not reach other hosts: a lock that another host wrote counts as held as long
as it is renewed.
"""

import contextlib
import fcntl
import functools
import glob
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from dalle2_jax import signals
from dalle2_jax.errors import UserError
from dalle2_jax.files import UNFINISHED

BEAT = 10.0
"""Seconds after which the holder renews its lock."""

NAME = ".lock"
"""Name of the file that locks the folder it is in."""

_TEMPORARY = re.compile(rf"\..+\.\w{{16}}{re.escape(UNFINISHED)}")


@contextlib.contextmanager
def hold(path: Path, what: str | Path) -> Iterator[None]:
    """Holds a lock file for the duration of a block; makes its folder if needed, and removes it again if it is empty.

    Args:
      path: the lock file.
      what: the path or name of what it locks, for the error.

    Raises:
      UserError: another process holds it; the message names the process and the time it began.
    """
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _take(path, what)
    released = threading.Event()

    def release() -> None:
        if not released.is_set():
            released.set()
            path.unlink(missing_ok=True)
            os.close(handle)
            if made:
                with contextlib.suppress(OSError):  # it is in use
                    path.parent.rmdir()

    def beat() -> None:
        while not released.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(path)

    with signals.on_exit(release):
        try:
            threading.Thread(target=beat, daemon=True, name="lock").start()
            yield
        finally:
            release()


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder of results, as `hold`, and removes the temporary files that killed processes left."""
    with hold(folder / NAME, folder):
        sweep(folder)
        yield


def sweep(folder: Path) -> None:
    """Removes the temporary files that killed processes left in a folder that this process has locked."""
    for path in folder.glob(f".*{UNFINISHED}"):
        if _TEMPORARY.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def _take(path: Path, what: str | Path) -> int:
    """Takes a lock and returns its open file. UserError if another process holds it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            held = _locks(handle) is False
            holder = _holder(handle)
            if held or (holder.get("host") not in (None, socket.gethostname()) and _is_renewed(path, holder)):
                raise UserError(_in_use(path, what, holder))
            if not _is_at(handle, path):  # its holder removed it meanwhile
                os.close(handle)
                continue
            about = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "command": shlex.join(sys.argv)[:200],
            }
            os.ftruncate(handle, 0)
            try:
                os.pwrite(handle, json.dumps(about).encode(), 0)
            except OSError as error:
                path.unlink(missing_ok=True)
                raise OSError(f"{path} cannot be written ({error.strerror})") from error
            return handle
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(handle)
            raise


def _locks(handle: int) -> bool | None:
    """Locks an open file or folder; False if another process has locked it, None on disks without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file or folder still has this name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _holder(handle: int) -> dict[str, object]:
    """Returns the content of a lock, which describes its holder; {} while it is being written."""
    try:
        about = json.loads(os.pread(handle, 2**12, 0) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _is_renewed(path: Path, holder: dict[str, object]) -> bool:
    """Waits until another host renews its lock; False if it does not within two and a half beats."""
    print(f"note: waiting to see whether {_who(holder)} still runs ({path})", file=sys.stderr)
    end, before = time.monotonic() + 2.5 * BEAT, path.stat().st_mtime_ns
    while time.monotonic() < end:
        time.sleep(min(1.0, BEAT / 10))
        try:
            with path.open("rb") as file:  # opening it makes NFS ask the server
                if os.fstat(file.fileno()).st_mtime_ns != before:
                    return True
        except FileNotFoundError:
            return False
    return False


def _who(holder: dict[str, object]) -> str:
    if "pid" not in holder:
        return "another process"
    return f"process {holder['pid']} on {holder.get('host')}"


def _in_use(path: Path, what: str | Path, holder: dict[str, object]) -> str:
    since = f" since {holder['since']} ({holder.get('command')})" if "since" in holder else ""
    return (
        f"{what} is in use by {_who(holder)}{since}: wait until that ends, or name another folder. If it has ended, "
        f"remove {path}"
    )


def own_mark() -> str:
    """Returns the part of a hidden folder's name that identifies this host: a lock may not hold across hosts."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '_', socket.gethostname())}-"


@contextlib.contextmanager
def unfinished(parent: Path, prefix: str) -> Iterator[Path]:
    """Yields a new hidden folder in ``parent``, to be filled and moved into place; removes it if it was not moved.

    Folders with the same prefix that killed processes of this host left behind are removed first.

    Args:
      parent: an existing folder.
      prefix: of the folder's name: a dot and a word for its purpose.
    """
    own = prefix + own_mark()
    for left in parent.glob(f"{glob.escape(own)}*"):
        with contextlib.suppress(OSError), _locked(left) as free:
            if free and re.fullmatch("[0-9a-f]{8}", left.name.removeprefix(own)):
                shutil.rmtree(left, ignore_errors=True)
    while True:
        folder = parent / f"{own}{secrets.token_hex(4)}"
        folder.mkdir()
        with _locked(folder) as free:
            if free is False or not folder.exists():  # another process removes it as one that was left
                continue
            with signals.on_exit(functools.partial(shutil.rmtree, folder, ignore_errors=True)):
                try:
                    yield folder
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
            return


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Locks a folder until the end of the block, or of the process.

    Yields True, or False if another process has locked it, or None on disks without locks, where nothing is removed.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield _locks(handle)
    finally:
        os.close(handle)
