"""nbconvert's HTML with formulas as MathML, which browsers draw by themselves, and without anything that acts."""

from __future__ import annotations

import re
from html import escape
from typing import Any, Literal
from xml.etree import ElementTree

import bleach
from bleach.css_sanitizer import CSSSanitizer
from jinja2 import pass_context
from jinja2.runtime import Context
from latex2mathml.converter import convert_to_element
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

_MATH = """
math mrow mi mn mo mtext mspace ms mfrac msqrt mroot mstyle merror mpadded mphantom menclose msub msup msubsup munder
mover munderover mmultiscripts mprescripts mtable mtr mlabeledtr mtd
""".split()
_TEXT = """
h1 h2 h3 h4 h5 h6 p div span br hr a img b i u s em strong del ins sub sup small code pre kbd samp var q blockquote cite
abbr mark ul ol li dl dt dd table caption colgroup col thead tbody tfoot tr th td details summary figure figcaption
""".split()
_EVERYWHERE = {"id", "class", "title", "style", "align", "dir", "lang"}
_OF_MATH = """
display mathvariant mathcolor mathbackground mathsize displaystyle scriptlevel stretchy fence form separator lspace
rspace symmetric largeop movablelimits accent accentunder linethickness width height depth voffset minsize maxsize
columnalign rowalign columnspan rowspan columnspacing rowspacing columnlines rowlines frame notation
""".split()
_OF = {
    "a": {"href"},
    "img": {"src", "alt", "width", "height"},
    "ol": {"start"},
    "td": {"colspan", "rowspan"},
    "th": {"colspan", "rowspan", "scope"},
    "details": {"open"},
    **dict.fromkeys(_MATH, set(_OF_MATH)),
    "math": {*_OF_MATH, "tabindex"},
}


def _allowed(tag: str, name: str, value: str) -> bool:
    if value.lstrip().lower().startswith("data:"):
        return (tag, name) == ("img", "src")
    return name in _EVERYWHERE or name in _OF.get(tag, ())


_CLEANER = bleach.Cleaner(
    tags={*_MATH, *_TEXT},
    attributes=_allowed,
    protocols={"http", "https", "mailto", "data"},
    css_sanitizer=CSSSanitizer(),
)


def mathml(tex: str, display: Literal["block", "inline"]) -> str:
    """A formula as MathML; one that cannot be converted is shown as it is written."""
    try:
        made = convert_to_element(tex, display=display)
        made.attrib.pop("xmlns", None)  # HTML needs none, and within a heading it would become a prefix
        if display == "block":
            made.set("tabindex", "0")  # where it is wider than the page, keys scroll it
        text = ElementTree.tostring(made, encoding="unicode")
    except Exception:  # its errors have no common class, and a report is worth more than one formula
        return f"<code>{escape(tex)}</code>"
    # The converter writes symbols as character references; any other text stays escaped.
    text = re.sub(r"&amp;(#[xX]?[0-9A-Fa-f]+;)", r"&\1", text)
    # In text TeX writes an underscore as \_, which the converter would print as it is.
    return text.replace("\\_", "_")


class _Renderer(IPythonRenderer):
    def block_math(self, body: str) -> str:
        return mathml(body, "block")

    def inline_math(self, body: str) -> str:
        return mathml(body, "inline")

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")


class PageExporter(HTMLExporter):
    """``HTMLExporter`` whose markdown cells hold MathML, and no element or attribute that runs or loads something."""

    @pass_context
    def markdown2html(self, context: Context, source: str) -> str:
        """The filter of that name, as ``HTMLExporter`` has it, with another renderer."""
        cell: Any = context.get("cell", {})
        renderer = _Renderer(
            escape=False,
            attachments=cell.get("attachments", {}),
            embed_images=self.embed_images,
            path=context.get("resources", {}).get("metadata", {}).get("path", ""),
            anchor_link_text=self.anchor_link_text,
            exclude_anchor_links=self.exclude_anchor_links,
            **self.lexer_options,
        )
        return _CLEANER.clean(MarkdownWithMath(renderer=renderer).render(source))
