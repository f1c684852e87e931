"""What tests of the server share: quick settings, images to send, a server on a free port."""

import contextlib
import io
import threading

import numpy as np
from PIL import Image

from dalle2_jax.server import serve as serving

TIMEOUT = 300
"""Seconds; only a hang takes so long."""

FEW = {"prior": {"steps": 2}, "decoder": {"steps": 2}, "upsampler_1": {"steps": 2}}
"""Settings that make requests quick."""

FEW_WITHOUT_PRIOR = {name: settings for name, settings in FEW.items() if name != "prior"}


def png(side=16, mode=None, clear=False, width=None):
    """Returns a PNG file; ``clear`` makes its upper half transparent."""
    pixels = np.random.default_rng(side).integers(0, 256, (side, width or side, 4), np.uint8)
    pixels[..., 3] = 255
    if clear:
        pixels[: side // 2, :, 3] = 0
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode or ("RGBA" if clear else "RGB")).save(content, "PNG")
    return content.getvalue()


@contextlib.contextmanager
def running(service):
    """Serves on a free port in a thread; yields the server and its address."""
    server = serving.Server(service.config, service)
    listener = server.listen()
    thread = threading.Thread(target=server.run_on, args=(listener,))
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.stop()
        thread.join(TIMEOUT)
        assert not thread.is_alive()
