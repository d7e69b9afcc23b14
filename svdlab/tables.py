"""One table for every place that shows one: a terminal (rich), a page or notebook (HTML), a document (Markdown)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Literal, NamedTuple

from svdlab.errors import printable

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Style = Literal["", "bold", "good", "bad", "marked", "head"]

_RICH = {"": "", "bold": "bold", "good": "green", "bad": "red", "marked": "bold yellow", "head": "bold"}
# A colour comes with its background, so that it can be read on a dark page too; a page may define others of its own.
CSS = {
    "": "",
    "bold": "font-weight:bold",
    "good": "color:var(--svdlab-good,#00523f);background:var(--svdlab-good-paper,#e2f3ec)",
    "bad": "color:var(--svdlab-bad,#8a2300);background:var(--svdlab-bad-paper,#fdebe2)",
    "marked": "color:var(--svdlab-marked,#1a1a1a);background:var(--svdlab-marked-paper,#fbe3d6);font-weight:bold",
    "head": "",
}


class Column(NamedTuple):
    """A column's head, and how its cells stand; without any head in a table it has no line of heads."""

    name: str
    align: Literal["left", "right", "center"] = "left"


class Cell(NamedTuple):
    """A cell that is more than text.

    Attributes:
        text: what terminals and Markdown show, and a page too unless there is ``html``.
        style: "bold", "good" (green), "bad" (red), "marked" (on a background), "head" (a row's).
        html: trusted HTML for a page in the text's place, such as a link or a picture.
    """

    text: str
    style: Style = ""
    html: str | None = None


@dataclass(frozen=True)
class Table:
    """Formatted cells under named columns.

    Attributes:
        columns: from left to right; a plain text is a left-aligned column.
        rows: cells, formatted; a plain text is a cell without style. In a shorter row the last cell spans the rest.
        title: above; ``caption`` below. Both may have several lines.
    """

    columns: Sequence[str | Column]
    rows: Sequence[Sequence[str | Cell]]
    title: str = ""
    caption: str = ""

    def to_rich(self) -> RichTable:
        """For a terminal: text folds, numbers (right-aligned columns) stay on one line."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        # Without rules between columns more fits a terminal of 80 columns.
        look = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0), "collapse_padding": True}
        title, caption = (Text(_lines(text)) if text else None for text in (self.title, self.caption))
        table = RichTable(title=title, title_justify="left", **look)  # type: ignore[arg-type]
        table.caption, table.caption_justify = caption, "left"
        table.show_header = self._has_heads
        for name, align in self._columns:
            table.add_column(Text(name), justify=align, no_wrap=align == "right", overflow="fold")
        for row in self._rows():
            table.add_row(*(Text(_lines(cell.text), _RICH[cell.style]) for cell in row))
        return table

    def __rich__(self) -> RichTable:
        return self.to_rich()

    def to_html(self) -> str:
        """For a page or a notebook; every text is escaped."""
        title, caption = (escape(text).replace("\n", "<br>") for text in (self.title, self.caption))
        heads = "".join(
            f'<th scope="col"{_style(align)}>{escape(name)}</th>' if name else "<td></td>"
            for name, align in self._columns
        )
        thead = f"<thead><tr>{heads}</tr></thead>" if self._has_heads else ""
        tbody = "".join(f"<tr>{''.join(self._html_cells(row))}</tr>" for row in self._rows())
        return (
            f"<table>{f'<caption>{title}</caption>' if title else ''}{thead}<tbody>{tbody}</tbody></table>"
            f"{f'<p>{caption}</p>' if caption else ''}"
        )

    def _repr_html_(self) -> str:
        return self.to_html()

    def _html_cells(self, row: Sequence[Cell]) -> Iterator[str]:
        for i, (cell, (_, align)) in enumerate(zip(row, self._columns, strict=False)):
            left = len(self._columns) - i
            span = f' colspan="{left}"' if i == len(row) - 1 and left > 1 else ""
            tag, scope = ("th", ' scope="row"') if cell.style == "head" else ("td", "")
            shown = escape(cell.text) if cell.html is None else cell.html
            yield f"<{tag}{scope}{span}{_style(align, CSS[cell.style])}>{shown}</{tag}>"

    def to_markdown(self) -> str:
        """A pipe table with title and caption as paragraphs; ends with a line break."""
        marks = {"left": "---", "right": "---:", "center": ":---:"}
        lines = [_line([name for name, _ in self._columns]), _line([marks[align] for _, align in self._columns], "")]
        for row in self._rows():
            texts = [f"**{cell.text}**" if cell.style and cell.text else cell.text for cell in row]
            lines.append(_line(texts + [""] * (len(self._columns) - len(texts))))
        return "\n\n".join(filter(None, [self.title, "\n".join(lines), self.caption])) + "\n"

    @property
    def _columns(self) -> list[Column]:
        return [Column(column) if isinstance(column, str) else column for column in self.columns]

    @property
    def _has_heads(self) -> bool:
        return any(name for name, _ in self._columns)

    def _rows(self) -> Iterator[list[Cell]]:
        for row in self.rows:
            if len(row) > len(self.columns):
                raise ValueError(f"a row of {len(row)} cells in a table of {len(self.columns)} columns")
            yield [Cell(cell) if isinstance(cell, str) else cell for cell in row]


def _lines(text: str) -> str:
    """A text without the control characters that a terminal would obey, but for line breaks."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _style(align: str, css: str = "") -> str:
    return f' style="text-align:{align}{f";{css}" if css else ""}"'


def _line(cells: Sequence[str], pad: str = " ") -> str:
    """One line of a pipe table, in which a pipe or a line break would end a cell."""
    return "|" + "|".join(f"{pad}{cell.replace('|', chr(92) + '|').replace(chr(10), ' ')}{pad}" for cell in cells) + "|"
