"""Sphinx: Markdown pages, the API out of docstrings, the config reference out of the schemas."""

import importlib.metadata
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tools")]

import config_reference  # noqa: E402 (a tool of the checkout)

(HERE / "config.md").write_text(config_reference.to_markdown())

project = "glintru_rec"
release = version = importlib.metadata.version("glintru_rec")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
exclude_patterns = ["_build", "consumers"]
myst_heading_anchors = 3
default_role = "code"  # docstrings name things in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say shapes and dtypes, which types do not
suppress_warnings = ["myst.xref_missing"]  # links to files of the checkout
