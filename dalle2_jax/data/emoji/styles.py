"""The styles of emoji, and their images: PNG, WebP or SVG to uint8[S, S, 3] on white."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8

from dalle2_jax.data.emoji.concepts import normalised
from dalle2_jax.data.emoji.packages import PACKAGES, Package, open_package
from dalle2_jax.data.images import decoding
from dalle2_jax.errors import UserError

ICONS, CHARACTERS = "icons.json", "chars.json"
"""Files of an icon set of Iconify: SVG by name, and names by code points."""


class Drawing(NamedTuple):
    """One emoji in one style.

    Attributes:
        source: package, version and place in it.
        content: the image file or SVG.
        render: side in pixels to uint8[side, side, 3], on white.
    """

    source: str
    content: bytes
    render: Callable[[int], UInt8[np.ndarray, "S S 3"]]


@dataclass(frozen=True)
class Style:
    """A family of emoji by one author.

    Attributes:
        phrase: its name in captions.
        vector: package of its SVG, an icon set of Iconify; "" for none.
        raster: package of its image files; "" for none.
        raster_folder: where they are in the package.
        raster_side: side of their images in pixels.
        licence: SPDX identifier.
        credit: author and address.
    """

    phrase: str
    vector: str
    raster: str
    raster_folder: str
    raster_side: int
    licence: str
    credit: str

    def package(self, resolution: int) -> Package:
        """Returns the package of images for a resolution: image files, or SVG beyond their size."""
        return PACKAGES[self.raster if self._is_raster(resolution) else self.vector]

    def drawings(self, resolution: int, folder: Path | None) -> dict[str, Drawing]:
        """Returns the emoji of the style by key (see `normalised`).

        Args:
            resolution: at which they will be rendered.
            folder: of the package's file; None fetches it.

        Raises:
            UserError: the package cannot be read, or the renderer of SVG is not installed.
        """
        package = self.package(resolution)
        if self._is_raster(resolution):
            return _raster_drawings(package, folder, self.raster_folder)
        return _vector_drawings(package, folder)

    def _is_raster(self, resolution: int) -> bool:
        return bool(self.raster) and (not self.vector or resolution <= self.raster_side)


_MICROSOFT = "Fluent Emoji by Microsoft, https://github.com/microsoft/fluentui-emoji"

STYLES = {
    "noto": Style(
        phrase="noto emoji",
        vector="noto_svg",
        raster="noto_png",
        raster_folder="img/google/64/",
        raster_side=64,
        licence="Apache-2.0",
        credit="Noto Emoji by Google, https://github.com/googlefonts/noto-emoji",
    ),
    "fluent_3d": Style("fluent 3d emoji", "", "fluent_3d", "assets/", 256, "MIT", _MICROSOFT),
    "fluent_flat": Style("fluent flat emoji", "fluent_flat", "", "", 0, "MIT", _MICROSOFT),
    "twemoji": Style(
        phrase="twemoji",
        vector="twemoji",
        raster="",
        raster_folder="",
        raster_side=0,
        licence="CC-BY-4.0",
        credit="Twemoji by Twitter and other contributors, https://github.com/jdecked/twemoji",
    ),
}
"""The styles by name."""


def _raster_drawings(package: Package, folder: Path | None, inside: str) -> dict[str, Drawing]:
    def is_image(path: str) -> bool:
        return path.startswith(inside) and Path(path).suffix in decoding.SUFFIXES

    def make(path: str, content: bytes) -> Drawing:
        return Drawing(f"{package}/{path}", content, lambda side: _on_square(decoding.decode(content), side))

    contents = open_package(package, folder, is_image).contents
    return {normalised(Path(path).stem): make(path, content) for path, content in sorted(contents.items())}


def _vector_drawings(package: Package, folder: Path | None) -> dict[str, Drawing]:
    renderer = _svg_renderer()
    files = open_package(package, folder, lambda path: path in (ICONS, CHARACTERS))
    icons, characters = files.json(ICONS), files.json(CHARACTERS)

    def make(name: str) -> Drawing:
        svg, width, height = svg_of(icons, name)
        larger = "width" if width >= height else "height"

        def render(side: int) -> UInt8[np.ndarray, "S S 3"]:
            return _on_square(decoding.decode(renderer(svg_string=svg, skip_system_fonts=True, **{larger: side})), side)

        return Drawing(f"{package}/{ICONS}#{name}", svg.encode(), render)

    names = {normalised(code_points): name for code_points, name in sorted(characters.items(), reverse=True)}
    return {key: make(name) for key, name in sorted(names.items())}


def svg_of(icons: Mapping[str, Any], name: str) -> tuple[str, int, int]:
    """Returns an icon of an Iconify set, or one of its aliases, as SVG with its width and height.

    Args:
        icons: Iconify's JSON: ``icons`` with a ``body`` each, ``aliases`` with a ``parent``, default sizes.
        name: of the icon or alias.
    """
    alias = icons.get("aliases", {}).get(name, {}) if name not in icons["icons"] else {}
    icon = icons["icons"][alias.get("parent", name)]
    width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
    body = icon["body"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f"<svg {namespaces} {size}>{body}</svg>", width, height


def _svg_renderer() -> Callable[..., bytes]:
    """Returns the function that renders SVG to PNG. UserError if it is not installed."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise UserError("resvg-py, which renders SVG, is not installed: pip install 'dalle2_jax[emoji]'") from None
    return svg_to_bytes


def _on_square(image: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "S S 3"]:
    """Scales an image so that its longer side is ``side``, and centres it on white."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if size != (width, height):
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    square = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = image
    return square
