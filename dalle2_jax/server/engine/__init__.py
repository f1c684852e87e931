"""The engine: one thread that owns the devices and batches the rows of all requests. It is independent of HTTP."""

from dalle2_jax.server.engine.engine import Closing, Engine, Monitor, QueueFull, Ticket
from dalle2_jax.server.engine.queue import Finished, Item, Step

__all__ = ["Closing", "Engine", "Finished", "Item", "Monitor", "QueueFull", "Step", "Ticket"]
