"""Sphinx configuration: `make docs` builds the site, without a network, and every warning is an error."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
import typing
from pathlib import Path
from typing import Any, TypeVar

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import sparsetweaks  # noqa: E402
import sparsetweaks.lottery  # noqa: E402

project = "sparsetweaks"
author = "the authors of sparsetweaks"
release = version = "0.1.0"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb"]
exclude_patterns = ["_build", "jupyter_execute"]
nitpicky = True
root_doc = "index"

# Other projects' names stand in signatures; their pages are elsewhere, and the site is built without a network. So do type
# variables, and what is no part of the public surface.
_INSIDE = ("display.facts.Facts", "surgery.units.Geometry", "surgery.programs.Program")
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|fx|collections|pathlib|matplotlib|hypothesis|typing|types|click|os|random|s)\..*"),
    (
        r"py:.*",
        r"Tensor|Optimizer|Figure|Path|Any|Callable|Iterable|Iterator|Mapping|Sequence|SearchStrategy",
    ),
    (r"py:.*", r"Literal|optional|Model|Activation|Numbers|dict\[str"),
    (r"py:.*", "|".join(re.escape(f"sparsetweaks.{name}") for name in _INSIDE)),
]

html_theme = "furo"
html_title = "sparsetweaks"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"
pygments_style = "friendly"
pygments_dark_style = "github-dark"

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_excludepatterns = ["tutorials/*"]  # `make docs` has run these already, in a kernel of their own
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False


# ------------------------------------------------------------------------------------------------- docstrings


def documented() -> dict[int, str]:
    """What the API pages show, by identity: the name under which a link finds it."""
    found: dict[int, str] = {}
    for module in (sparsetweaks, sparsetweaks.analysis):
        for name in module.__all__:
            found[id(getattr(module, name))] = f"{module.__name__}.{name}"
    return found


NAMES = documented()


def linked(text: str, module: str) -> str:
    """The docstrings' `code` in single backticks as a link where it names something on these pages, else as code."""
    found = getattr(sys.modules.get(module), text, None) if text.isidentifier() else None
    for owner in (sparsetweaks, sparsetweaks.analysis):
        if found is None and text in owner.__all__:
            found = getattr(owner, text)
    name = NAMES.get(id(found)) if found is not None else None
    return f":py:obj:`{text} <{name}>`" if name else f"``{text}``"


def prepare(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings here are plain text with `code`: make reStructuredText of them, but for the examples."""
    module = getattr(thing, "__module__", None) or name.rpartition(".")[0]
    if what in ("attribute", "property", "data"):
        lines[:] = app.env.temp_data.pop("plain docstring", lines)
    example = False
    for number, line in enumerate(lines):
        example = line.lstrip().startswith((">>>", "...")) or (example and bool(line.strip()))
        if example:
            continue
        parts = re.split(r"(``[^`]+``|`[^`]+`)", line)
        for place, part in enumerate(parts):
            if part.startswith("`") and not part.startswith("``"):
                parts[place] = linked(part[1:-1], module)
            elif not part.startswith("`"):
                parts[place] = _STAR.sub(r"\\*", part.replace("|", r"\|"))
        lines[number] = "".join(parts)


_STAR = re.compile(r"(?<![\\*\w])\*(?=[\s)])|(?<=\s)\*(?=\s)")  # a product, as against *emphasis*


_SEVERAL = re.compile(r"^\s+[a-z_]+(, [a-z_]+)+(?=: )")  # names of parameters that share a description


def keep_plain(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from reading the first words before a colon as a type."""
    if what in ("attribute", "property", "data"):
        app.env.temp_data["plain docstring"] = list(lines)
        lines[:] = []
    else:  # "a, b: what both are" would make a type of "a"
        lines[:] = [_SEVERAL.sub(lambda found: found[0].replace(", ", ",\u200b"), line) for line in lines]


# ------------------------------------------------------------------------------------------------- mathematics


def visit_math(writer: Any, node: nodes.Element) -> None:
    writer.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def visit_math_block(writer: Any, node: nodes.Element) -> None:
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


# ------------------------------------------------------------------------------------------------- directives


class Modules(SphinxDirective):
    """Every module of a package, in alphabetical order, with all that is public in it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        package = importlib.import_module(self.arguments[0])
        text = []
        for found in pkgutil.iter_modules(package.__path__):
            if not found.name.startswith("_"):
                name = f"{package.__name__}.{found.name}"
                title = f"``{name}``"
                text += [title, "-" * len(title), "", f".. automodule:: {name}", "   :members:", ""]
        return self.parse_text_to_nodes("\n".join(text), allow_section_headings=True)


def without_ways_back(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Sources have links back to the reference that lead nowhere for names from inside modules: leave them out."""
    if page.startswith("_modules/") and "body" in context:
        context["body"] = re.sub(r'<a class="viewcode-back"[^>]*>.*?</a>', "", context["body"])


def as_text(app: Sphinx, env: Any, node: nodes.Element, text: nodes.Node) -> nodes.Node | None:
    """Type variables and aliases of ours stand in signatures and have no place of their own: no link, no warning."""
    module, _, name = str(node.get("reftarget", "")).rpartition(".")
    found = getattr(sys.modules.get(module), name, None) if module.startswith("sparsetweaks") else None
    return text if isinstance(found, TypeVar) or typing.get_origin(found) is not None else None


def setup(app: Sphinx) -> None:
    app.connect("missing-reference", as_text)
    app.connect("html-page-context", without_ways_back)
    app.connect("autodoc-process-docstring", keep_plain, priority=400)
    app.connect("autodoc-process-docstring", prepare, priority=600)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.add_directive("modules", Modules)
