"""Settings of the documentation: `make docs` builds it with warnings as errors and without a network."""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # of notebooks

import docstrings  # noqa: E402
import generate  # noqa: E402
import missing  # noqa: E402

missing.stand_in("flwr", "nvflare", "pfl")

project = "gradlens"
author = "the gradlens authors"
copyright = f"2026, {author}"
release = generate.version()

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"gradlens {release}"
html_extra_path = ["_build/extra"]  # the committed reports, below reports/
html_static_path = ["static"]
html_css_files = ["outputs.css"]
html_copy_source = False
html_show_sourcelink = False

nitpicky = True
default_role = "code"
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_typehints = "none"  # types are in the docstrings
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
myst_url_schemes = {"http": None, "https": None, "mailto": None, "report": "../reports/{{path}}"}
nb_execution_mode = "off"  # they are stored as they ran; a test runs them
nb_merge_streams = True

generate.everything(DOCS / "generated", DOCS / "_build" / "extra")


def setup(app):
    """Connects what makes docstrings and links of the repository fit for the site."""
    app.connect("autodoc-process-docstring", docstrings.prepared, priority=400)  # before numpydoc
    app.connect("source-read", generate.site_links)
