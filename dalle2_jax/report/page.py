"""The page of a report: one HTML file without scripts, and without anything to load."""

from collections.abc import Sequence

import dalle2_jax
from dalle2_jax.report.compare import comparison
from dalle2_jax.report.markup import Markup, tag
from dalle2_jax.report.model import SystemReport
from dalle2_jax.report.sections import notes, system_section
from dalle2_jax.report.style import STYLE

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The content security policy: the browser loads nothing and runs nothing, whatever a caption holds."""


def page(systems: Sequence[SystemReport], title: str, written: str, remarks: Sequence[str] = ()) -> str:
    """Returns the HTML of a report.

    Args:
      systems: what is reported; more than one are compared.
      title: of the page.
      written: the date.
      remarks: notes about the report itself.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    links = [tag("a", system.name, href=f"#system-{number}") for number, system in enumerate(systems)]
    links = [tag("a", "Comparison", href="#comparison"), *links] if len(systems) > 1 else []
    body = tag(
        "body",
        tag("header", tag("h1", title), tag("nav", *links) if links else None, *notes(remarks)),
        comparison(systems) if len(systems) > 1 else None,
        *(system_section(system, number) for number, system in enumerate(systems)),
        tag("footer", f"Written by dalle2 report, dalle2_jax {dalle2_jax.__version__}, {written}."),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"
