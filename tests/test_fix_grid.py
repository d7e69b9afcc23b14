"""The slider of a page without a kernel: at every position it carries what the panel would show there."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
from chart_lines import drawn, unpacked
from PIL import Image

from svdlab.notebook.explorer import Explorer
from svdlab.notebook.fix_grid import FixGrid
from svdlab.notebook.players import Player, case_clips
from svdlab.notebook.tables import number_html
from svdlab.parity.lab import Lab

BUGS = ["guidance_per_step", "guidance_constant"]


@pytest.fixture(scope="module")
def explorer(tiny: Path) -> Explorer:
    lab = Lab(str(tiny), image=Image.linear_gradient("L").convert("RGB").resize((48, 32)))
    settings = lab.settings(num_frames=2, num_inference_steps=2, height=32, width=32)
    sliders = ["min_guidance_scale", "max_guidance_scale"]
    return Explorer(lab, settings, BUGS, sliders, [dict(zip(sliders, pair, strict=True)) for pair in ((2, 5), (1, 3))])


def test_a_start_that_is_no_number_stands_behind_the_numbers(explorer: Explorer) -> None:
    for start, grid in ((None, (1, 2)), ("auto", (2, 1))):
        settings = explorer.start.replace(decode_chunk_size=start, decode="exact")
        changes = [{"decode_chunk_size": value} for value in grid]
        other = Explorer(explorer.lab, settings, BUGS[:1], ["decode_chunk_size"], changes)
        found, at = other._positions()
        assert [change["decode_chunk_size"] for change in found] == [1, 2, start] and at == 2


def carried(page: str) -> dict[str, Any]:
    """What the last script of the figure holds, its pictures put in."""
    figure = page.partition("</figure><h3>")[0]
    grid = unpacked(re.findall(r'<script type="text/plain">([A-Za-z0-9+/=]*)</script>', figure)[-1])
    pictures = re.findall(r'<img [^>]*pixelated[^>]*src="([^"]*)"', figure)
    for sprite, src in zip(grid["shown"], pictures, strict=True):
        assert not grid["sprites"][sprite], "carried once"
        grid["sprites"][sprite] = src
    return grid


def test_a_page_carries_every_case_of_its_slider(explorer: Explorer) -> None:
    page = explorer.page()
    grid = carried(page)
    assert (grid["axis"], grid["labels"], grid["start"]) == (
        "min guidance scale to max guidance scale",
        ["2 to 5", "1 to 3"],
        1,
    )
    assert [bug["name"] for bug in grid["bugs"]] == BUGS
    for bug in grid["bugs"]:
        for case, change in zip(bug["cases"], explorer.changes, strict=True):
            own = explorer.lab.case(explorer.start.replace(**change), bug["name"])
            for which in ("off", "on"):
                assert case["numbers"][which] == number_html(own, which)
                made = Player(case_clips(own, which), own.settings.fps).content["clips"]
                assert [(c["title"], c["src"]) for c in made] == [
                    (t, grid["sprites"][i]) for t, i in case["clips"][which]
                ]
            off = {p.name: p.divergence for p in own.off.probes if p.divergence}
            line = drawn(case["plot"]["spec"])[f"fix off ({bug['name']})"]
            assert {name: line[name] for name in off} == pytest.approx(off, rel=1e-5)
    assert len(set(grid["sprites"])) == len(grid["sprites"]), "a picture is carried once"
    shown = html.unescape(page.partition('<script type="text/plain">')[0])
    assert grid["bugs"][0]["cases"][1]["numbers"]["off"] in page and f"<h3>{BUGS[0]}: " in shown, (
        "without scripts, the start"
    )


def test_the_start_is_a_position_of_the_slider(explorer: Explorer) -> None:
    other = Explorer(explorer.lab, explorer.start, BUGS[:1], ["fps"], [{"fps": 3}, {"fps": 20}])
    grid = carried(other.page())
    assert (grid["labels"], grid["start"], grid["unit"]) == (["3", "7", "20"], 1, "1/s")


def test_clips_that_do_not_fit_are_left_out(explorer: Explorer) -> None:
    case = explorer.lab.case(explorer.start, BUGS[0])
    size = len(Player(case_clips(case, "off"), 7).content["clips"][0]["src"])
    grid = FixGrid("fps", ["3", "7"], 0, BUGS[:1], max_bytes=size)
    other = explorer.lab.case(explorer.start.replace(seed=5), BUGS[0])
    grid.add(case, 0)
    grid.add(other, 1)
    (bug,) = carried(grid.to_html())["bugs"]
    assert bug["cases"][0]["clips"] and bug["cases"][1]["clips"] is None and bug["cases"][1]["numbers"]["off"]
