"""``dalle2 init``: copies the example configs into a folder, to be read and changed."""

import pathlib

from dalle2_jax.cli import args
from dalle2_jax.config import shipped

EXAMPLE = "dalle2 init my_project"


def make_parser() -> args.Parser:
    """Returns the command's parser."""
    description = (
        "Copies the config pages that come with the package to FOLDER/configs. Existing files are not changed."
    )
    parser = args.make_parser("dalle2 init", description, EXAMPLE)
    help_text = "folder that gets a folder configs (default: the current one)"
    parser.add_argument("folder", nargs="?", type=args.path, default=pathlib.Path("."), help=help_text)
    return parser


def main() -> None:
    """Runs the command."""
    options = make_parser().parse_args()
    written = shipped.copy_to(options.folder)
    configs = options.folder / shipped.FOLDER
    print(f"{configs}: {len(written)} config pages" if written else f"{configs}: all config pages exist already")
    print(f"Next: dalle2 train --config {configs / 'shapes.py'}:clip --workdir {options.folder / 'runs' / 'demo'}")
