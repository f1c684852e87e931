"""The systems that a server has: loaded when they are first used, the least recently used one evicted by memory."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from dalle2_jax.errors import UserError, shown
from dalle2_jax.system.system import System


class UnknownSystem(UserError):
    """A request for a system that the server does not have.

    Attributes:
      name: the name that was requested.
    """

    def __init__(self, name: str, names: tuple[str, ...]):
        super().__init__(f"there is no model {shown(name)}: choose from {', '.join(names)}")
        self.name = name


class Loaded(NamedTuple):
    """A system in memory, and the bytes of its arrays."""

    system: System
    nbytes: int


class Systems:
    """Systems by name. `get` is called by the engine's thread only; the other methods by any.

    Args:
      loaders: name -> the function that loads the system; the first is the default.
      memory: bytes that loaded systems may take in all; the one in use is always kept. None has no limit.
    """

    def __init__(self, loaders: Mapping[str, Callable[[], System]], memory: int | None = None):
        self._loaders, self._memory = dict(loaders), memory
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._lock = threading.Lock()
        self.created = int(time.time())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all systems; the first is the default."""
        return tuple(self._loaders)

    @property
    def nbytes(self) -> int:
        """The bytes that loaded systems take."""
        with self._lock:
            return sum(loaded.nbytes for loaded in self._loaded.values())

    @property
    def loaded(self) -> tuple[str, ...]:
        """The names of the systems in memory, the least recently used first."""
        with self._lock:
            return tuple(self._loaded)

    def check(self, name: str) -> None:
        """Raises UnknownSystem unless there is a system of this name."""
        if name not in self._loaders:
            raise UnknownSystem(name, self.names)

    def get(self, name: str) -> System:
        """Returns a system, which is loaded if it is not in memory.

        Raises:
          UnknownSystem: there is none of that name.
          UserError: it cannot be loaded.
        """
        self.check(name)
        with self._lock:
            if name in self._loaded:
                self._loaded.move_to_end(name)
                return self._loaded[name].system
        system = self._loaders[name]()
        loaded = Loaded(system, size_of(system))
        with self._lock:
            self._loaded[name] = loaded
            while self._memory is not None and len(self._loaded) > 1 and self._total() > self._memory:
                self._loaded.popitem(last=False)
        return system

    def _total(self) -> int:
        return sum(loaded.nbytes for loaded in self._loaded.values())


def size_of(system: System) -> int:
    """Returns the bytes of a system's arrays."""
    arrays = jax.tree.leaves([stage.variables for stage in system.stages.values()])
    return sum(array.nbytes for array in arrays)
