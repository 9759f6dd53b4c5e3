"""How sphinx builds these pages. The pages are plain Markdown; scripts/docs calls this."""

import re
from pathlib import Path

project = "gguftool"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px", "sidebar_width": "240px", "description": "Mixture-of-Experts that fit"}
html_sidebars = {"**": ["about.html", "navigation.html", "searchfield.html"]}
myst_heading_anchors = 4
HERE = Path(__file__).parent
ORDER = (
    "tutorial",
    "methods/index",
    "fit",
    "report",
    "results",
    "format",
    "patches",
    "trust",
    "architectures",
    "criteria",
)


def add_contents(app, name, source):
    """Lists the pages for the side bar; in the Markdown itself such a list would show as code."""
    # What lies outside of the pages is named, not linked.
    source[0] = re.sub(r"\[([^\]]+)\]\((?:\.\./)+((?:README|patches/README)\.md)\)", r"\1 (`\2`)", source[0])
    if name == "index":
        others = sorted(path.stem for path in HERE.glob("*.md") if path.stem != "index")
        listed = [*ORDER, *(other for other in others if other not in ORDER)]
    elif name == "methods/index":
        listed = sorted(path.stem for path in (HERE / "methods").glob("*.md") if path.stem != "index")
    else:
        return
    source[0] += "\n\n```{toctree}\n:hidden:\n\n" + "\n".join(listed) + "\n```\n"


def setup(app):
    """Called by sphinx."""
    app.connect("source-read", add_contents)
