"""An in-process web server for the files of a folder, with injected failures."""

import contextlib
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """State of the server: served folder, failures to inject and the request log.

    Attributes:
        folder: The folder whose files are served below "/data/".
        fails: Maps a file name to one of ``FAILURES``, or to a list of failures that are injected once each, in order.
        requests: (method, file name, range) of every request.
        url: URL of the folder.
    """

    def __init__(self, folder):
        self.folder, self.fails, self.requests, self.url = folder, {}, [], None
        self.ended = threading.Event()

    def failure(self, name):
        """Returns the failure to inject into this request, or None."""
        planned = self.fails.get(name)
        return (planned.pop(0) if planned else None) if isinstance(planned, list) else planned


FAILURES = ("hang", "not found", "forbidden", "broken", "cut", "ignore range", "drop")


class Handler(BaseHTTPRequestHandler):
    """Answers HEAD and GET, ranges included."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        site, name = self.server.site, urllib.parse.unquote(self.path.removeprefix("/data").lstrip("/"))
        requested = self.headers.get("Range")
        site.requests.append((self.command, name, requested))
        failure = site.failure(name) if body else None
        if failure == "hang":
            site.ended.wait(30)
        if failure in ("hang", "drop"):
            self.close_connection = True
            return
        if not name:
            links = "".join(f'<a href="/data/{path.name}">{path.name}</a>\n' for path in sorted(site.folder.iterdir()))
            self._send(200, f"<html>{links}</html>".encode(), body)
            return
        status = {"not found": 404, "forbidden": 403, "broken": 500}.get(failure)
        path = site.folder / name
        if status or not path.is_file():
            self._send(status or 404, b"no", body)
            return
        content, headers = path.read_bytes(), {"Last-Modified": self.date_time_string(path.stat().st_mtime)}
        if requested and failure != "ignore range":
            first, _, last = requested.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            self._send(206, part, body, headers, cut=failure == "cut")
        else:
            self._send(200, content, body, headers, cut=failure == "cut")

    def _send(self, status, content, body, headers=(), cut=False):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), "Content-Type": "text/html", **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut


@contextlib.contextmanager
def served(folder):
    """Serves a folder while the context is open; yields its `Site`."""
    site = Site(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.site, server.daemon_threads = site, True
    site.url = f"http://127.0.0.1:{server.server_port}/data"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
