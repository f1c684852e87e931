"""Hooks of mkdocs: pages of the site that are files of the repository's root, and links to them."""

import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]

PAGES = {
    # file of the repository: page of the site
    "benchmarks/RESULTS.md": "results.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
} | {
    # the card of each included system
    str(card.relative_to(ROOT)): f"cards/{card.parent.name}.md"
    for card in sorted(ROOT.glob("dalle2_jax/pretrained/*/README.md"))
}


def on_files(files, config):
    """Adds the pages whose text is outside docs/."""
    for source, page in PAGES.items():
        text = re.sub(r"\]\((?:\.\./)?docs/", "](", (ROOT / source).read_text())
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lets links to those files lead to their pages."""
    for source, target in PAGES.items():
        markdown = re.sub(rf"\]\(((?:\.\./)*)\.\./{re.escape(source)}", rf"](\1{target}", markdown)
    return markdown
