"""What a page's sentences ask of its reader, and whether the page has what they speak of."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

# Of a page that opens at once.
PAGE_BYTES = 3 * 2**20
# Words that speak of a control, and what of a page brings one: nothing does where a kernel would have to answer.
_CONTROLS = {
    r"\bsliders?\b": ("svdlab-fix-grid", "svdlab-board", "svdlab-inspector"),
    r"\bplay button\b|\btwo keys\b": ("svdlab-board", "svdlab-player"),
    r"\bclicks?\b": ("svdlab-board",),
    r"\b(pick|under the cursor)\b": ("svdlab-inspector",),
    r"\bthird choice\b|\bpanel\b|\bcell (above|below)\b|\bin the place of\s+`?case\b": (),
    r"\b(press|choose|pick|click)\s+(Run|Diagnose|Load|Compare)\b": (),
}
# What asks a reader to do something begins a sentence or a part of one; elsewhere it tells what a program does.
_ASKS = (
    r"(?:^|[.:;,>]\s+|\b(?:or|and|then|to)\s+|\d\.\s+)"
    r"\b(press|choose|select|switch|toggle|turn|drag|upload|type|edit|change|move|run)\b"
    r"(?=\s+(the|a|an|its|it|this|that|your)\b)"
)


def asked_in_vain(text: str, controls: str) -> list[str]:
    """The phrases about controls that are not there.

    Args:
        text: plain text or Markdown, as a page shows it.
        controls: the page's HTML, or any text that has the class names of what is on it.
    """
    return list(_in_vain(text, controls))


def _in_vain(text: str, controls: str) -> Iterator[str]:
    for words, bringing in {**_CONTROLS, _ASKS: ()}.items():
        if any(name in controls for name in bringing):
            continue
        for found in re.finditer(words, text, re.IGNORECASE | re.MULTILINE):
            yield text[max(0, found.start() - 30) : found.end() + 30].replace("\n", " ")


def visible(page: str) -> str:
    """A page's text without its folded code, styles, scripts and what needs no reader."""
    page = page.partition("<main>")[2]
    page = re.sub(r'<details class="code">.*?</details>|<(script|style)\b.*?</\1>', " ", page, flags=re.DOTALL)
    blocks = re.sub(r"</?(p|h\d|li|td|th|div|pre|figure|summary)\b[^>]*>", "\n", page)
    return html.unescape(re.sub(r"<[^>]+>", "", blocks))
