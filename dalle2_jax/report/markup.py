"""HTML and SVG by functions: text is escaped unless it was made here, so that no caption becomes markup."""

import html


class Markup(str):
    """Text that is markup already."""


Child = str | None

_VOID = ("img", "meta", "br", "line", "rect", "circle", "path", "polyline")


def tag(name: str, *children: Child, **attributes: object) -> Markup:
    """Returns an element.

    Args:
      name: of the element.
      *children: text, which is escaped, or markup; None is omitted.
      **attributes: "class_" is class, and other underscores are hyphens; None is omitted.
    """
    parts = [
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    ]
    start = f"<{name}{''.join(parts)}"
    if name in _VOID and not children:
        return Markup(f"{start}>" if name in ("img", "meta", "br") else f"{start}/>")
    return Markup(f"{start}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    """Returns children one after the other."""
    return Markup("".join(text(child) for child in children if child is not None))


def text(value: str) -> Markup:
    """Returns markup unchanged, and other text escaped."""
    return value if isinstance(value, Markup) else Markup(html.escape(value, quote=True))


def table(head: list[Child], rows: list[list[Child]], class_: str = "") -> Markup:
    """Returns a table that scrolls sideways where it is too wide; the first cell of a row is its heading."""
    titles = tag("tr", *(tag("th", cell or "", scope="col") for cell in head))
    lines = [
        tag("tr", tag("th", row[0] or "", scope="row"), *(tag("td", cell or "") for cell in row[1:])) for row in rows
    ]
    content = tag("table", tag("thead", titles), tag("tbody", *lines))
    return tag("div", content, class_=f"scroll {class_}".strip(), tabindex=0)
