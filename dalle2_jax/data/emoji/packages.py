"""The npm packages of emoji: fetched or read from a folder, verified, and read without unpacking to disk."""

import gzip
import hashlib
import io
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle2_jax.data.formats.tar_headers import DamagedError, members
from dalle2_jax.errors import DataError, UserError, printable
from dalle2_jax.reading import parse_json, read_bytes

MAX_UNPACKED = 2**28
"""Maximum bytes of a package when it is decompressed."""

_ROOT = "package/"
"""The folder in which npm packs all files."""


@dataclass(frozen=True)
class Package:
    """A version of an npm package.

    Attributes:
        name: on npm.
        version: which version.
        sha256: of the file that ``npm pack`` writes.
        size: of that file in bytes.
    """

    name: str
    version: str
    sha256: str
    size: int

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def file_name(self) -> str:
        """The name that ``npm pack`` gives the file."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = {
    "captions": Package(
        "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", 6_711_091
    ),
    "noto_png": Package(
        *("emoji-datasource-google", "16.0.0"),
        *("fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", 74_344_091),
    ),
    "noto_svg": Package(
        "@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", 3_102_958
    ),
    "fluent_3d": Package(
        *("@lobehub/fluent-emoji-3d", "1.1.0"),
        *("c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", 15_792_027),
    ),
    "fluent_flat": Package(
        *("@iconify-json/fluent-emoji-flat", "1.2.6"),
        *("7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", 1_172_438),
    ),
    "twemoji": Package(
        "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", 1_555_888
    ),
}
"""The packages by what they are used for."""


@dataclass(frozen=True)
class PackageFiles:
    """Files of one package.

    Attributes:
        package: the package.
        contents: path in the package to content.
    """

    package: Package
    contents: dict[str, bytes]

    def json(self, path: str) -> Any:
        """Returns the value of a JSON file."""
        return parse_json(self.contents[path])


def open_package(package: Package, folder: Path | None, wanted: Callable[[str], bool]) -> PackageFiles:
    """Reads files of a package.

    Args:
        package: which package.
        folder: where its .tgz file is; None fetches it with ``npm pack``.
        wanted: whether a path in the package is read.

    Raises:
        DataError: the file is missing in ``folder`` or is not the expected one.
        UserError: npm is not installed or does not find the package.
    """
    if folder is not None:
        return PackageFiles(package, _unpacked(package, _verified(package, folder / package.file_name), wanted))
    with tempfile.TemporaryDirectory() as temporary:
        _fetch(package, Path(temporary))
        content = _verified(package, Path(temporary) / package.file_name)
    return PackageFiles(package, _unpacked(package, content, wanted))


def _fetch(package: Package, folder: Path) -> None:
    """Downloads a package into a folder. UserError if npm fails."""
    instead = f"or download {package.file_name} elsewhere and name its folder with --from"
    try:
        done = subprocess.run(
            ["npm", "pack", str(package)], capture_output=True, text=True, errors="replace", cwd=folder
        )
    except OSError as error:
        raise UserError(f"npm cannot be run ({error.strerror}): install Node.js, {instead}") from None
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "err" in line.lower()), "no message")
        raise UserError(f"npm pack {package} failed ({printable(reason)[:200]}): check the connection, {instead}")


def _verified(package: Package, path: Path) -> bytes:
    """Returns the content of a package's file. DataError if it is missing or another file."""
    try:
        content = read_bytes(path, limit=package.size)
    except FileNotFoundError:
        raise DataError(f"there is no {path}: npm pack {package} writes it", path) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): fetch it again with npm pack {package}", path
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != package.sha256:
        expected = f"expected {package.sha256}, {package.size} bytes; found {found}, {len(content)} bytes"
        raise DataError(f"{path} is damaged (sha256: {expected}): fetch it again with npm pack {package}", path)
    return content


def _unpacked(package: Package, content: bytes, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Returns the wanted files of a packed package; links in it are ignored."""
    try:
        unpacked = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MAX_UNPACKED + 1)
        if len(unpacked) > MAX_UNPACKED:
            raise DataError(f"{package} has more than {MAX_UNPACKED} bytes unpacked: use another version")
        found = {}
        for member in members(io.BytesIO(unpacked)):
            path = member.name.removeprefix(_ROOT)
            if wanted(path):
                found[path] = unpacked[member.offset : member.offset + member.size]
        return found
    except (EOFError, gzip.BadGzipFile, zlib.error, DamagedError) as error:
        raise DataError(f"{package} cannot be unpacked ({error}): fetch it again with npm pack {package}") from None
