"""A headless browser, driven by the Chrome DevTools Protocol over a pipe."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time

BROWSER = os.environ.get("BROWSER_FOR_TESTS") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
TIMEOUT = 300
"""Seconds; only a hang takes so long."""

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)


class Page:
    """A page of a browser.

    Attributes:
      requests: the addresses that it requested.
      problems: messages of its console, and uncaught errors.
    """

    def __init__(self, send, receive):
        self._send, self._receive, self._numbers = send, receive, itertools.count(1)
        self._session, self.requests, self.problems = None, [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Calls a method of the protocol and returns its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        self._send(message if self._session is None else {**message, "sessionId": self._session})
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _note(self, event):
        kind, params = event.get("method"), event.get("params", {})
        if kind == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif kind == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"])
        elif kind == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])

    def resize(self, width, height, dark=False):
        """Sets the size of the window and the preferred colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def go(self, address):
        """Opens an address; a page that is open already is left first, so that only the address counts."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)

    def run(self, script):
        """Returns the value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, script):
        """Waits until the page is loaded and an expression is true, and returns its value."""
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            if value := self.run(
                f"document.readyState === 'complete' && location.href !== 'about:blank' && ({script})"
            ):
                return value
            time.sleep(0.1)
        raise AssertionError(f"{script} is not true; the page shows: {self.run('document.body.innerText')}")

    def place(self, selector):
        """Scrolls an element into view and returns its (left, top, width, height)."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.run(f"(({{x, y, width, height}}) => [x, y, width, height])({found}.getBoundingClientRect())")
        assert box[2] and box[3], f"{selector} is not visible"
        return box

    def drag(self, points):
        """Presses the mouse at the first of several points, moves over the others and releases it."""
        for number, (x, y) in enumerate(points):
            kind = "mouseMoved" if number else "mousePressed"
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
        x, y = points[-1]
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", clickCount=1)

    def click(self, selector):
        """Clicks on the middle of an element."""
        left, top, width, height = self.place(selector)
        self.drag([(left + width / 2, top + height / 2)])

    def write(self, selector, text):
        """Types a text into an element, in place of what is there."""
        self.click(selector)
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def press(self, key, code=0, text=""):
        """Presses a key."""
        about = {"key": key, "windowsVirtualKeyCode": code, "text": text}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def screenshot(self, path):
        """Writes an image of the whole page."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def overflow(self):
        """Returns by how many pixels the page is wider than the window, and the elements that reach over its edge."""
        over = "e.offsetParent && e.getBoundingClientRect().right > innerWidth + 1"
        elements = f"[...document.querySelectorAll('body *')].filter((e) => {over}).map((e) => e.outerHTML)"
        return self.run(f"[document.documentElement.scrollWidth - innerWidth, {elements}]")


@contextlib.contextmanager
def open_page(folder):
    """Starts a browser with a profile in a folder; yields a page."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    redirected = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
    words = ["bash", "-c", redirected, "_", BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}"]
    fds, quiet = (theirs_in, theirs_out), {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, pass_fds=fds, **quiet) as process:
        for fd in fds:
            os.close(fd)
        with os.fdopen(ours_out, "wb", buffering=0) as out, os.fdopen(ours_in, "rb", buffering=0) as incoming:
            buffer = bytearray()

            def receive():
                while b"\0" not in buffer:
                    part = incoming.read(65_536)
                    assert part, "the browser has ended"
                    buffer.extend(part)
                message, _, rest = bytes(buffer).partition(b"\0")
                buffer[:] = rest
                return json.loads(message)

            try:
                yield Page(lambda message: out.write(json.dumps(message).encode() + b"\0"), receive)
            finally:
                process.kill()
