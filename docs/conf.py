# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of Sphinx; the site is built by `make docs`, offline, with warnings as errors."""

import importlib.metadata

project = "numpyro_smcopt"
author = "Contributors to the numpyro_smcopt project"
copyright = author
release = version = importlib.metadata.version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
default_role = "py:obj"  # single backticks in docstrings name objects
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"numpyro_smcopt {release}"
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False


def skip_fields(app, what, name, obj, skip, options):
    """Leave out the members that a NamedTuple makes of its fields: the class docstring describes them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app):
    app.connect("autodoc-skip-member", skip_fields)
