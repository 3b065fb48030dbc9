"""How Sphinx makes the site: `make docs`.

Its source is the whole repository, so that a link from one file to another is the same here as in a checkout, and
README.md is the home page as it is.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import svdiff_kernels

ROOT = Path(__file__).parents[1]

project = "svdiff-kernels"
copyright = "the svdiff-kernels maintainers"
version = release = svdiff_kernels.__version__
html_title = f"{project} {version}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "README"
include_patterns = ["*.md", "docs/**", "examples/**"]
# Or Sphinx would look into every other folder, and a virtual environment has thousands.
exclude_patterns = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("docs", "examples")]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "py:obj"  # `Factors` is a link where there is one of that name, else code
highlight_language = "none"
viewcode_follow_imported_members = True

html_theme = "furo"
html_extra_path = ["index.html"]
html_copy_source = False

PAGES = """
```{toctree}
:hidden:
:caption: Guides

docs/training
docs/inference
docs/merging
docs/stylize
docs/ui
docs/peft
docs/compat
docs/exports
docs/evaluation
examples/README
examples/vit/README
examples/lightning/README
examples/trainer/README
examples/cpp/README
examples/serve/README
docs/performance
docs/study
```

```{toctree}
:hidden:
:caption: Reference

docs/reference/svdiff_kernels
docs/reference/svdiff
docs/reference/evaluation
docs/reference/peft
docs/reference/compat
```

```{toctree}
:hidden:
:caption: Project

docs/architecture
docs/versioning
CHANGELOG
CONTRIBUTING
```
"""


def add_pages(app: Any, name: str, source: list[str]) -> None:
    """The home page gets the list of all others, which would be noise in README.md."""
    if name == root_doc:
        source[0] += PAGES


def add_settings(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """A command's settings say what they are in their metadata, where --help finds it."""
    if what != "class" or not dataclasses.is_dataclass(thing):
        return
    settings = [field for field in dataclasses.fields(thing) if "help" in field.metadata]
    lines += ["", *(f":ivar {field.name}: {field.metadata['help']}" for field in settings), ""]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_pages)
    app.connect("autodoc-process-docstring", add_settings)
