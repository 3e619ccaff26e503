"""Sphinx makes the site of these pages: `make docs`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import idist

ROOT = Path(__file__).parents[1]
OUTSIDE = {  # pages of the site whose text is elsewhere in the repository
    "project/contributing": "CONTRIBUTING.md",
    "project/changelog": "CHANGELOG.md",
    "project/examples": "examples/README.md",
}
PAGES = {path: f"docs/{name}.md" for name, path in OUTSIDE.items()}

project = "idist"
author = "idist contributors"
copyright = "idist contributors"  # the name that Sphinx reads  # noqa: A001
release = idist.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"idist {release}"
html_static_path = ["_static"]
html_css_files = ["idist.css"]
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
# Every link of a docstring leads somewhere, those into Python and torch aside, for which their inventories would have
# to be downloaded. A word before a colon in "Raises:" is a link as well.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|collections|contextlib|datetime|logging|multiprocessing|os|pathlib|pickle|subprocess)\b.*"),
    (r"py:(class|obj)", r"(idist\.[a-z.]*)?[A-Z]"),  # type variables
    (r"py:class", r"Wrap|MixedPrecisionPolicy"),  # what overloads name, and nobody imports to run
]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# What is typed after the prompt is copied, what is printed is not.
copybutton_prompt_text = r"^(\(\w+\))?\$ "
copybutton_prompt_is_regexp = True


def whole(app: Any, name: str, source: list[str]) -> None:
    """Give a page the text that is outside, and let links to such texts lead to their pages."""
    path = OUTSIDE.get(name)
    if path is not None:
        source[0] = (ROOT / path).read_text()
    written_in = os.path.dirname(path if path is not None else f"docs/{name}")
    shown_in = os.path.dirname(f"docs/{name}")

    def moved(link: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(written_in, link[1]))
        return f"]({os.path.relpath(PAGES.get(target, target), shown_in)}{link[2] or ''})"

    source[0] = re.sub(r"\]\((?!\w+:)([^()#\s]+)(#[^()\s]*)?\)", moved, source[0])


def spaced(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """``Shape: ...`` and the like, which our docstrings write on the line, begin in bold; addresses are links."""
    for i, line in enumerate(lines):
        line = re.sub(r"(?<![`<])(https?://[^\s,]+)", r"`<\1>`__", line)
        lines[i] = re.sub(r"^(\s*)(Shape|Cost|Source):(?=\s)", r"\1**\2:**", line)


def complete(app: Any, env: Any) -> None:
    """The reference has every public name, or the build fails."""
    from sphinx.util import logging

    documented = set(env.get_domain("py").objects)
    missing = [name for name in idist.__all__ if f"idist.{name}" not in documented]
    if missing:
        logging.getLogger(__name__).warning("docs/reference/ lacks the public names %s", ", ".join(missing))


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("source-read", whole)
    app.connect("autodoc-process-docstring", spaced, priority=400)  # before napoleon, at 500
    app.connect("env-check-consistency", complete)
