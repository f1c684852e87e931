"""A web server in this process, of the files in a folder, that can fail in every way a server does."""

import contextlib
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """What is served, how it fails, and what was asked for.

    Attributes:
        folder: whose files are served, below "/data/".
        fails: by file name, one of ``FAILURES`` or a list of them, each of which takes its turn once.
        asked: (method, file name, range) of every request.
        url: of the folder.
    """

    def __init__(self, folder):
        self.folder, self.fails, self.asked, self.url = folder, {}, [], None
        self.ended = threading.Event()

    def failure(self, name):
        """Returns what goes wrong now, None if nothing does."""
        told = self.fails.get(name)
        return (told.pop(0) if told else None) if isinstance(told, list) else told


FAILURES = ("hang", "gone", "forbidden", "broken", "cut", "whole", "drop")


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
        asked = self.headers.get("Range")
        site.asked.append((self.command, name, asked))
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
        status = {"gone": 404, "forbidden": 403, "broken": 500}.get(failure)
        path = site.folder / name
        if status or not path.is_file():
            self._send(status or 404, b"no", body)
            return
        content, headers = path.read_bytes(), {"Last-Modified": self.date_time_string(path.stat().st_mtime)}
        if asked and failure != "whole":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
            self._send(206, part, body, headers, cut=failure == "cut")
        else:
            self._send(200, content, body, headers, cut=failure == "cut")

    def _send(self, status, content, body, headers={}, cut=False):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), "Content-Type": "text/html", **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut


@contextlib.contextmanager
def served(folder):
    """Serves a folder; yields its `Site`."""
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
