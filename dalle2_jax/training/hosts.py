"""Training on several hosts: joining the other processes of a pod, and leaving them after an error."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import jax
from jax._src import distributed

from dalle2_jax.errors import TemporaryError, UsageError, UserError, printable

_LEAVING = 5.0
"""Seconds that a host which ends because of an error waits for other hosts that end too."""

_LOST = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "Gloo", "gloo", "NCCL", "onnection", "eartbeat")
"""Parts of the messages of errors that the loss of a host causes."""


@contextlib.contextmanager
def joined(heartbeat: int, shutdown: int = 300) -> Iterator[None]:
    """Joins the other hosts of a pod, which the environment describes, for the duration of a block.

    Args:
      heartbeat: seconds without a heartbeat after which a host counts as lost.
      shutdown: seconds that a host which has finished waits for the others.

    Raises:
      UsageError: the environment describes no cluster.
      TemporaryError: another host is lost.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it would intercept SIGTERM
    try:
        _check_address(os.environ.get("JAX_COORDINATOR_ADDRESS"))
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=shutdown)
    except Exception as error:  # jax raises many types
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(
            f"--multihost: this process cannot join other hosts ({reason}): start it on a cluster that JAX detects "
            "(TPU pod, Slurm, Open MPI, Kubernetes); on a single host remove --multihost"
        ) from error
    try:
        yield
    except UserError:  # the other hosts may raise it too, for example after an interruption
        _leave_together()
        raise
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = printable(error)[:200]
        if any(word in reason for word in _LOST):
            message = f"another host is lost ({reason}): start all hosts again; the same command continues"
            raise TemporaryError(message) from error
        raise


def _check_address(address: str | None) -> None:
    """Raises ValueError or OSError for an invalid address of the first host: native code would end the process."""
    if address:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) >= 2**16:
            raise ValueError(f"JAX_COORDINATOR_ADDRESS {address!r} is not HOST:PORT")
        socket.getaddrinfo(host.strip("[]"), int(port))


def wait_for_all(name: str) -> None:
    """Waits until all hosts have called this with the same name; collectives on CPUs would give up after 30 seconds."""
    if jax.process_count() > 1:
        client = distributed.global_state.client
        assert client is not None
        client.wait_at_barrier(name, 24 * 3600 * 1000)


def _leave_together() -> None:
    """Waits briefly for the other hosts to end too: if the first host ends alone, native code ends the others."""
    leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    leaving.start()
    leaving.join(_LEAVING)
