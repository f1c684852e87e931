"""API keys, and the limits of each key's holder.

The file of keys has a line ``NAME HASH`` for each, the hash being the SHA-256 of the key in hexadecimal. Keys are long
random strings, so that a fast hash without salt is enough: there is nothing to guess.
"""

import hashlib
import hmac
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dalle2_jax.errors import DataError
from dalle2_jax.server.api.errors import ApiError, too_many

MAX_FILE = 1_000_000
"""Bytes of a file of keys."""

_LINE = re.compile(r"([\w.@-]{1,64})\s+([0-9a-fA-F]{64})")

_IDLE = 600.0
"""Seconds after which the limits of a holder who made no request are forgotten."""


def read_keys(path: Path) -> dict[str, str]:
    """Reads a file of keys.

    Returns:
      Name of the holder -> SHA-256 of the key, in hexadecimal.

    Raises:
      DataError: it cannot be read, has no key, or a line is no key; the message has the line's number, not its text.
    """
    try:
        text = path.read_bytes()[: MAX_FILE + 1].decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the file of keys {path} cannot be read ({type(error).__name__})", path) from error
    if len(text) > MAX_FILE:
        raise DataError(f"the file of keys {path} has more than {MAX_FILE} bytes", path)
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None or found[1] in keys:
            problem = "repeats a name" if found else "is not NAME and the SHA-256 of a key"
            raise DataError(f"{path}, line {number} {problem}", path)
        keys[found[1]] = found[2].lower()
    if not keys:
        raise DataError(f"{path} has no key", path)
    return keys


def authenticate(keys: Mapping[str, str], authorization: str | None) -> str:
    """Returns the name of the holder of the key in an Authorization header.

    Raises:
      ApiError: 401, there is none, or it is unknown.
    """
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise _unauthorized("an API key is required: send the header Authorization: Bearer KEY", "missing_api_key")
    digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
    holders = [name for name, known in keys.items() if hmac.compare_digest(digest, known)]
    if not holders:
        raise _unauthorized("the API key is not valid", "invalid_api_key")
    return holders[0]


def _unauthorized(message: str, code: str) -> ApiError:
    return ApiError(401, message, None, code, {"WWW-Authenticate": "Bearer"})


class Limits:
    """Requests per minute (a token bucket) and at a time of each holder. Used in the event loop only.

    Args:
      per_minute: requests.
      concurrency: requests at a time.
      clock: seconds.
    """

    def __init__(self, per_minute: int, concurrency: int, clock: Callable[[], float] = time.monotonic):
        self._rate, self._burst = per_minute / 60.0, float(per_minute)
        self._concurrency, self._clock = concurrency, clock
        self._tokens: dict[str, tuple[float, float]] = {}
        self._running: dict[str, int] = {}

    @contextmanager
    def request(self, holder: str) -> Iterator[None]:
        """Counts a request of a holder while it runs.

        Raises:
          ApiError: 429, there are too many.
        """
        running = self._running.get(holder, 0)
        if running >= self._concurrency:
            raise too_many(f"{running} requests of this key are running, the limit: wait for one", 1)
        self._spend(holder)
        self._running[holder] = running + 1
        try:
            yield
        finally:
            self._running[holder] -= 1
            if not self._running[holder]:
                del self._running[holder]

    def _spend(self, holder: str) -> None:
        now = self._clock()
        tokens, then = self._tokens.get(holder, (self._burst, now))
        tokens = min(self._burst, tokens + (now - then) * self._rate)
        if tokens < 1:
            raise too_many(f"more than {self._burst:g} requests a minute", (1 - tokens) / self._rate)
        self._tokens[holder] = tokens - 1, now
        if len(self._tokens) > 10_000:
            self._tokens = {name: pair for name, pair in self._tokens.items() if now - pair[1] < _IDLE}
