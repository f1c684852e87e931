"""Tiny npm packages of emoji, registered in place of the real ones."""

import gzip
import hashlib
import io
import json
import tarfile

from PIL import Image

from dalle2_jax.data.emoji import packages

SKINS = [
    {"hexcode": f"1F44B-1F3F{letter}", "label": f"waving hand: {name} skin tone", "tone": tone}
    for letter, name, tone in (("B", "light", 1), ("F", "dark", 5))
]
DATA = [
    {"hexcode": "1F1E6", "label": "regional indicator A"},
    {"hexcode": "1F34E", "label": "red apple", "tags": ["apple", "fruit", "health", "g2g", "snack", "diet", "pie"]},
    {"hexcode": "2764-FE0F", "label": "red heart", "tags": ["love"]},
    {"hexcode": "1F44B", "label": "waving hand", "tags": ["hello", "bye"], "skins": SKINS},
    {"hexcode": "1F1E6-1F1F9", "label": "flag: Austria"},
    {"hexcode": "1F9B0", "label": "red hair"},
    {"hexcode": "1F6BA", "label": "women\u2019s room", "tags": ["wc"]},
    {"hexcode": "1F68A", "label": "tram"},
]
PLACES = {"1F34E": (4, 42), "1F1E6-1F1F9": (9, 98), "1F9B0": (2, 33), "1F1E6": None}
GROUPS = {
    "groups": {"2": "component", "4": "food-drink", "8": "symbols", "9": "flags"},
    "subgroups": {"33": "hair-style", "42": "food-fruit", "95": "alphanum", "98": "country-flag"},
}
COLORS = {
    "1f34e": "red",
    "2764": "crimson",
    "1f44b": "gold",
    "1f44b-1f3fb": "tan",
    "1f6ba": "pink",
    "1f68a": "teal",
    "1f1e6-1f1f9": "blue",
}


def write_packages(folder, monkeypatch):
    """Writes all packages into a folder and registers their checksums; returns the folder."""
    for use, contents in contents_of_packages().items():
        register(monkeypatch, use, folder, tgz(contents))
    return folder


def register(monkeypatch, use, folder, content):
    """Writes a package's file and registers it; returns the package."""
    package = packages.Package(f"@tiny/{use}", "1.0.0", hashlib.sha256(content).hexdigest(), len(content))
    (folder / package.file_name).write_bytes(content)
    monkeypatch.setitem(packages.PACKAGES, use, package)
    return package


def contents_of_packages():
    """Returns the files of every package by its use."""
    data = []
    for entry in DATA:
        place = PLACES.get(entry["hexcode"], (8, 95))
        data.append(entry | ({"group": place[0], "subgroup": place[1]} if place else {}))
    found = {"captions": {"en/data.json": json.dumps(data), "meta/groups.json": json.dumps(GROUPS)}}
    found["noto_png"] = {f"img/google/64/{key}.png": square(64, color, "PNG") for key, color in COLORS.items()}
    found["noto_png"]["img/google/64/2764-fe0f.png"] = found["noto_png"].pop("img/google/64/2764.png")
    found["fluent_3d"] = {f"assets/{key}.webp": square(96, color, "WEBP") for key, color in COLORS.items()}
    for use in ("noto_svg", "fluent_flat", "twemoji"):
        found[use] = {
            "chars.json": json.dumps({key: color for key, color in COLORS.items()}),
            "icons.json": json.dumps(icon_set({color: rectangle(color) for color in COLORS.values()})),
        }
    return found


def icon_set(bodies):
    """Returns an icon set of Iconify with these bodies by name."""
    return {"prefix": "tiny", "width": 16, "height": 16, "icons": {name: {"body": bodies[name]} for name in bodies}}


def rectangle(color):
    """Returns the SVG of a rectangle in the left half of an icon of 16x16."""
    return f'<path fill="{color}" d="M0 0h8v16H0z"/>'


def square(side, color, kind):
    """Returns an image file: a square of a color in the middle, transparent around it."""
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    image.paste(Image.new("RGBA", (side // 2, side // 2), color), (side // 4, side // 4))
    content = io.BytesIO()
    image.save(content, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return content.getvalue()


def tgz(contents, links=()):
    """Returns a package's file with these contents, and with symbolic links to /etc/passwd."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path, content in contents.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for path in links:
            member = tarfile.TarInfo(f"package/{path}")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(member)
    return gzip.compress(packed.getvalue(), mtime=0)
