"""nbconvert's HTML with formulas as MathML, which browsers draw by themselves."""

from __future__ import annotations

from html import escape
from typing import Any, Literal

from jinja2 import pass_context
from jinja2.runtime import Context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath


def mathml(tex: str, display: Literal["block", "inline"]) -> str:
    """A formula as MathML; one that cannot be converted is shown as it is written."""
    try:
        # In text TeX writes an underscore as \_, which the converter would print as it is.
        return convert(tex, display=display).replace("\\_", "_")
    except Exception:  # its errors have no common class, and a report is worth more than one formula
        return f"<code>{escape(tex)}</code>"


class _Renderer(IPythonRenderer):
    def block_math(self, body: str) -> str:
        return mathml(body, "block")

    def inline_math(self, body: str) -> str:
        return mathml(body, "inline")

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")


class PageExporter(HTMLExporter):
    """``HTMLExporter`` whose markdown cells hold MathML."""

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
        return MarkdownWithMath(renderer=renderer).render(source)
