"""The config pages that come with the package.

A wheel has them in ``dalle2_jax/configs`` (setup.py copies them there); a checkout has them in ``configs/``.
"""

import pathlib

import dalle2_jax

FOLDER = "configs"
"""Name of the folder of the pages, in the repository, in the wheel, and where `copy_to` writes them."""


def folder() -> pathlib.Path:
    """Returns the folder of the pages."""
    package = pathlib.Path(dalle2_jax.__file__).parent
    installed = package / FOLDER
    return installed if installed.is_dir() else package.parent / FOLDER


def page_names() -> list[str]:
    """Returns the names of the pages, such as "shapes"."""
    return sorted(path.stem for path in folder().glob("*.py"))


def find_page(file: str) -> pathlib.Path | None:
    """Returns the file of a page.

    Args:
      file: a path, or the name of a page that comes with the package.

    Returns:
      ``file`` if there is such a file, else the package's page of that name, else None.
    """
    path = pathlib.Path(file)
    if path.is_file():
        return path
    return folder() / f"{file}.py" if file in page_names() else None


def copy_to(target: pathlib.Path) -> list[pathlib.Path]:
    """Copies the pages to ``target``/configs; files that exist there are not changed.

    Returns:
      The files that were written.
    """
    written = []
    for source in sorted(folder().glob("*.py")):
        path = target / FOLDER / source.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(source.read_bytes())
            written.append(path)
    return written
