"""Checks for ``pytest.raises``: what an error names."""


def names_path(path):
    """Returns a check that an error has one line and names a file or folder in its field ``path``."""
    return lambda error: str(error.path) == str(path) and "\n" not in str(error)
