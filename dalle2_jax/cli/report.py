"""``dalle2 report``: writes curves, samples and measures of systems as one HTML file."""

import pathlib

from dalle2_jax.cli import args

EXAMPLE = "dalle2 report runs/demo --out report.html"


def make_parser() -> args.Parser:
    """Returns the command's parser."""
    description = (
        "Writes one HTML file about systems: curves of training, samples, measures, configs, cost and provenance.\n"
        "Several systems, or those of a sweep, are compared. The file needs no network."
    )
    parser = args.make_parser("dalle2 report", description, EXAMPLE)
    runs = "folder of a system, or a folder with systems in it, such as that of a sweep"
    parser.add_argument("runs", nargs="+", type=args.path, metavar="RUN", help=runs)
    out = "file to write (default %(default)s)"
    parser.add_argument("--out", type=args.path, default=pathlib.Path("report.html"), help=out)
    results = "a results.json of dalle2 evaluate, or its folder, outside the system's folder; may be repeated"
    parser.add_argument("--results", action="append", type=args.path, default=[], metavar="PATH", help=results)
    parser.add_argument("--title", help="title of the page (default: the names of the systems)")
    return parser


def main() -> None:
    """Runs the command."""
    options = make_parser().parse_args()
    from dalle2_jax.report import write_report

    systems = write_report(options.runs, options.out, results=options.results, title=options.title)
    stages = sum(len(system.stages) for system in systems)
    size = options.out.stat().st_size / 1e6
    print(f"{options.out}: {len(systems)} system(s), {stages} stages, {size:.1f} MB")
