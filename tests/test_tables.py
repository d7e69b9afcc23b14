"""The one table: what it escapes, how its cells stand, what each output makes of styles and short rows."""

import io
import re

import pytest
from rich.console import Console

from svdlab.tables import CSS, Cell, Column, Style, Table

TABLE = Table(
    ["name", Column("ratio", "right")],
    [["a|b <i>", "1.5"], [Cell("[red]x", "bad"), Cell("9", "marked")], ["..."]],
    title="over & under",
    caption="below",
)


def terminal(table: Table, width: int = 60) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_html_escapes_text_and_marks_heads() -> None:
    html = TABLE.to_html()
    assert "a|b &lt;i&gt;" in html and "over &amp; under" in html and "<i>" not in html
    assert '<th scope="col" style="text-align:left">name</th>' in html
    assert '<td style="text-align:right">1.5</td>' in html
    assert f'<td style="text-align:left;{CSS["bad"]}">[red]x</td>' in html
    assert '<td colspan="2" style="text-align:left">...</td>' in html
    assert TABLE._repr_html_() == html


def test_html_of_a_cell_is_taken_as_it_is_and_a_row_head_is_a_head() -> None:
    html = Table(["", ""], [[Cell("k", "head"), Cell("link", html="<a href='x'>link</a>")]]).to_html()
    assert '<th scope="row" style="text-align:left">k</th>' in html and "<a href='x'>link</a>" in html
    assert "<thead>" not in html  # no column has a name
    html = Table(["", "b"], [["1", "2"]]).to_html()
    assert "<thead><tr><td></td><th" in html, "a head without a name is none"


@pytest.mark.parametrize("style", ["good", "bad", "marked"])
def test_a_colour_can_be_read_on_any_page(style: Style) -> None:
    """It comes with its background: JupyterLab Dark writes white on what has none."""
    ink, paper = re.findall(r"(#[0-9a-f]{6})", CSS[style])
    assert CSS[style].startswith("color:") and "background:" in CSS[style]
    assert contrast(ink, paper) >= 4.5


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_terminal_shows_markup_as_text_and_aligns() -> None:
    text = terminal(TABLE)
    lines = [line.rstrip() for line in text.splitlines()]
    assert any(line.startswith("[red]x") for line in lines)  # not read as rich's markup
    row, mark = (next(line for line in lines if key in line) for key in ("1.5", "[red]x"))
    assert len(row) == len(mark)  # right-aligned: the numbers end in one column
    assert "over & under" in text and "below" in text and "..." in text


def test_terminal_obeys_no_text() -> None:
    table = Table(
        ["[/x]", "b"],
        [["\x1b[31mred\x1b[0m", "\x9b2J\u202e\r"], [Cell("[/x]", "bad"), "[link=x]"]],
        "t\x1b]0;",
        "c\a\nd",
    )
    shown = io.StringIO()
    Console(width=100, file=shown, force_terminal=True, color_system=None).print(table)
    assert all(line.isprintable() for line in shown.getvalue().split("\n")), repr(shown.getvalue())
    for text in (r"\x1b[31mred", r"\x9b2J\u202e\r", r"t\x1b]0;", r"c\x07", "[/x]", "[link=x]"):
        assert text in shown.getvalue()


def test_markdown_escapes_pipes_and_aligns() -> None:
    assert TABLE.to_markdown() == (
        "over & under\n\n"
        "| name | ratio |\n|---|---:|\n| a\\|b <i> | 1.5 |\n| **[red]x** | **9** |\n| ... |  |\n\n"
        "below\n"
    )


def test_a_row_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="3 cells in a table of 1"):
        Table(["one"], [["1", "2", "3"]]).to_html()
