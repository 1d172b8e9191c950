"""How Sphinx builds these pages: ``scripts/check`` does, and every warning is an error."""

import tomllib
from pathlib import Path

_PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

project = "qmpsnap"
author = "the qmpsnap authors"
project_copyright = author
release = version = _PROJECT["version"]

extensions = ["myst_parser", "sphinxcontrib.mermaid"]
exclude_patterns = ["changelog.d"]  # CHANGELOG.md is made of them
myst_enable_extensions = ["colon_fence"]
myst_fence_as_directive = ["mermaid"]  # so that a web view of the repository draws it, too
myst_heading_anchors = 3
html_theme = "alabaster"
html_title = f"qmpsnap {release}"
nitpicky = True
