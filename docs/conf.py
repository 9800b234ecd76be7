"""The documentation as a site: `make docs` builds it into build/docs, and takes no warning."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from trimtab import __version__  # noqa: E402

project, author, copyright = "Trimtab", "the Trimtab authors", "the Trimtab authors, Apache-2.0"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["conf.py", "recipe_reference.py"]

html_theme = "furo"
html_title = f"Trimtab {version}"
html_show_sourcelink = False
html_copy_source = False

myst_heading_anchors = 3
myst_links_external_new_tab = False
suppress_warnings = ["myst.header"]  # a page may begin below its first level

default_role = "code"  # docstrings use one backtick, as comments do
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
autoclass_content = "both"


def own_fields(app, what, name, cls, options, signature, returned):
    """The signature of a config that extends one of PEFT's: the fields that are ours."""
    from dataclasses import is_dataclass
    from inspect import Parameter
    from inspect import signature as signature_of

    if what != "class" or not is_dataclass(cls) or not any(b.__module__.startswith("peft") for b in cls.__mro__):
        return None
    whole = signature_of(cls)
    ours = [p.replace(annotation=Parameter.empty) for p in whole.parameters.values() if p.name in cls.__annotations__]
    return f"(**peft_fields, {str(whole.replace(parameters=ours, return_annotation=whole.empty))[1:]}", None


def setup(app):
    app.connect("autodoc-process-signature", own_fields)
