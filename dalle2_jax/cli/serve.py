"""``dalle2 serve``: serves systems by OpenAI's Images API."""

import argparse
import importlib.util
import pathlib
import re
from typing import TYPE_CHECKING, Annotated

from dalle2_jax.cli import args
from dalle2_jax.errors import UsageError, UserError, shown
from dalle2_jax.ranges import Range

if TYPE_CHECKING:
    from dalle2_jax.server.config import ServerConfig

EXAMPLE = "dalle2 serve --system runs/demo --port 8000"

EXTRA = ("fastapi", "prometheus_client", "python_multipart", "uvicorn")
"""The modules of the extra ``serve``; Starlette imports the one for forms only when the first form arrives."""

_GIGABYTE = 10**9


def make_parser() -> args.Parser:
    """Returns the command's parser."""
    description = (
        "Serves systems by OpenAI's Images API, with the other commands under /dalle2. /docs describes the API.\n"
        "Ends on SIGTERM or Ctrl-C, when the requests that were started are finished; a second one ends it at once."
    )
    parser = args.make_parser("dalle2 serve", description, EXAMPLE)
    system = f"{args.SYSTEM}; NAME=SYSTEM gives the model's name; may be repeated, the first is the default model"
    parser.add_argument("--system", action="append", required=True, type=_named, metavar="[NAME=]SYSTEM", help=system)
    _add_network(parser)
    _add_engine(parser)
    return parser


def _add_network(parser: argparse.ArgumentParser) -> None:
    number = args.number
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    port = "port, 0 for a free one (default %(default)s)"
    parser.add_argument("--port", type=number(Annotated[int, Range(0, 65_535)]), default=8000, help=port)
    keys = "file with a line NAME SHA256 for each API key; required for a --host that other machines reach"
    parser.add_argument("--api_keys", type=args.path, metavar="FILE", help=keys)
    rate = "requests per minute and key (default %(default)s)"
    parser.add_argument("--requests_per_minute", type=args.positive_int, default=600, help=rate)
    at_once = "requests at a time and key (default %(default)s)"
    parser.add_argument("--concurrency", type=args.positive_int, default=32, help=at_once)
    cors = "origin of another web page that may call the API, such as https://example.org; may be repeated"
    parser.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help=cors)
    public = "address under which clients see the server, behind a proxy; for the URLs of images"
    parser.add_argument("--public_url", metavar="URL", help=public)
    files = "folder of images that are answered as url, which replicas may share (default: a temporary one)"
    parser.add_argument("--files", type=args.path, metavar="FOLDER", help=files)
    expiry = "seconds for which these images are kept (default %(default)s)"
    parser.add_argument("--url_seconds", type=args.positive_int, default=3600, help=expiry)
    parser.add_argument("--log_prompts", action="store_true", help="write captions to the log")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    sizes = "sizes of compiled batches (default 1,2,4,8,16); a single one makes images equal to the bit at any load"
    parser.add_argument("--batch_sizes", type=_sizes, default=(1, 2, 4, 8, 16), metavar="N,N,...", help=sizes)
    warmup = "load all systems and compile all batch sizes before the server is ready"
    parser.add_argument("--warmup", action="store_true", help=warmup)
    queue = "images that are accepted and not finished, at most (default %(default)s)"
    parser.add_argument("--queue", type=args.positive_int, default=64, help=queue)
    memory = "memory for loaded systems; the least recently used is unloaded (default: no limit)"
    parser.add_argument("--memory_gb", type=args.number(Annotated[float, Range(0)]), metavar="GB", help=memory)
    steps = "sampling steps of a stage that a request may set (default %(default)s)"
    parser.add_argument("--max_steps", type=args.positive_int, default=250, help=steps)
    drain = "seconds that started requests have to finish after SIGTERM (default %(default)s)"
    parser.add_argument("--drain_seconds", type=args.positive_int, default=60, help=drain)


def _named(word: str) -> tuple[str, str]:
    """Reads NAME=SYSTEM, or SYSTEM, whose name is that of its folder."""
    found = re.fullmatch(r"([\w.-]{1,64})=(.+)", word)
    if found:
        return found[1], found[2]
    name = re.sub(r"[^\w.-]", "_", pathlib.PurePath(word).name)[:64]
    if not name:
        raise argparse.ArgumentTypeError(f"{shown(word)} has no name: give NAME=SYSTEM")
    return name, word


def _sizes(word: str) -> tuple[int, ...]:
    """Reads batch sizes."""
    return tuple(int(args.number(Annotated[int, Range(1, 1024)])(part)) for part in word.split(","))


def read_config(options: argparse.Namespace) -> "ServerConfig":
    """Returns the configuration of a server.

    Raises:
      UsageError: two systems have one name, or the server would be reachable without keys.
    """
    from dalle2_jax.server.config import ServerConfig

    systems = dict(options.system)
    if len(systems) < len(options.system):
        raise UsageError(f"two systems are called {shown(options.system[-1][0])}: give each a name, NAME=SYSTEM")
    given = vars(options)
    names = ("host", "port", "api_keys", "requests_per_minute", "concurrency", "public_url", "files", "url_seconds")
    same = {name: given[name] for name in (*names, "log_prompts", "batch_sizes", "warmup", "queue", "max_steps")}
    memory = None if options.memory_gb is None else int(options.memory_gb * _GIGABYTE)
    return ServerConfig(systems, memory=memory, cors=tuple(options.cors), drain=options.drain_seconds, **same)


def check_installed() -> None:
    """Raises UserError unless the extra ``serve`` is installed."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"dalle2 serve needs {', '.join(missing)}: pip install 'dalle2_jax[serve]'")


def _log_to_stderr() -> None:
    """Prints the server's log, a line for each request, on standard error."""
    import logging

    handler, log = logging.StreamHandler(), logging.getLogger("dalle2_jax.server")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def main() -> None:
    """Runs the command."""
    options = make_parser().parse_args()
    check_installed()
    config = read_config(options)
    for _, path in options.system:
        if "://" not in path and not args.system(path).is_dir():
            raise UserError(f"there is no system at {path}")
    from dalle2_jax import signals
    from dalle2_jax.server.serve import Server

    _log_to_stderr()
    server = Server(config)
    listener = server.listen()
    host, port = listener.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    print(f"serving {', '.join(config.systems)} on http://{where}:{port}", flush=True)
    with signals.handled(server.stop, patient=lambda: True):
        server.run_on(listener)
