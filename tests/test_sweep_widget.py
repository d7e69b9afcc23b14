"""The sweep's panel and page: what they show is what is in the folder."""

from __future__ import annotations

import base64
import io
import re
import threading
from html import escape
from pathlib import Path

import numpy as np
import pytest
from html_tables import rows
from PIL import Image
from test_sweep import AXES, PICTURE, SMALL, failing

from svdlab.errors import SvdlabError
from svdlab.notebook.sweep_board import SweepExplorer, SweepPanel
from svdlab.notebook.sweep_view import (
    Board,
    HeatMap,
    View,
    comparison_html,
    film_html,
    parallel_svg,
    place_of,
    values_text,
)
from svdlab.parity.bugs import BUGS
from svdlab.svd.approximations import APPROXIMATIONS
from svdlab.sweep import Sweep, grid, run_sweep


@pytest.fixture(scope="module")
def explorer(tiny: Path) -> SweepExplorer:
    return SweepExplorer(AXES, SMALL, model=str(tiny), image=PICTURE)


@pytest.fixture
def panel(tiny: Path, tmp_path: Path) -> SweepPanel:
    return SweepPanel(SweepExplorer(AXES, SMALL, model=str(tiny), image=PICTURE, out=tmp_path / "out"))


def pick(panel: SweepPanel, *rows: tuple[str, str]) -> None:
    for row, (name, values) in zip(panel.rows, [*rows, *[("(no axis)", "")] * 3], strict=False):
        row.axis.value, row.entry.value = name, values


def films(html: str) -> list[str]:
    """Names of the clips in a board, row by row."""
    return re.findall(r'<img alt="([^"]+)"', html)


def cells(html: str, title: str) -> dict[str, str]:
    """A heat map's texts by point."""
    (table,) = re.findall(rf"<table><caption>{title}<small>.*?</table>", html)
    return dict(re.findall(r"data-point='(\w+)'[^>]*>([^<]*)<", table))


def test_a_page_shows_every_clip_and_its_numbers(explorer: SweepExplorer) -> None:
    page = explorer._repr_mimebundle_()["text/html"]
    assert films(page) == [f"fps {f}, max guidance scale {g:g}" for f in (7, 14) for g in (1, 3)]
    sweep, chosen = explorer.run(), explorer.run().at(fps=14, max_guidance_scale=1.0)
    assert f"data-chosen='{chosen}'" in page and page.count(" hidden>") == 3, "three of four points"
    for identity in sweep.plan.points:
        assert page.count(f"data-point='{identity}'") == 4, "in the grid and in three heat maps"
        assert f"{sweep.metrics(identity)['motion']:.3g} grey levels" in page and f"points/{identity}" in page
    answer = explorer.answer()
    assert answer["passed"] and answer["points"] == 4 and answer["the_same_to_the_last_bit"] == 2
    assert answer["mean_difference_fps"] == pytest.approx(explorer.run().table()["difference_fps"].mean())


def test_a_film_is_the_frames_exactly_or_reduced() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 24, 40, 3), dtype=np.uint8)
    html = film_html(frames, "noise & more")
    assert 'alt="noise &amp; more"' in html and "data-frames='5' data-columns='3' data-rows='2'" in html
    sheet = np.array(Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1]))))
    for i in range(5):
        y, x = 24 * (i // 3), 40 * (i % 3)
        assert np.array_equal(sheet[y : y + 24, x : x + 40], frames[i])
    assert 'class="film"' in html
    assert 'class="film reduced" style=\'--w:171;--h:128' in film_html(np.zeros((1, 576, 768, 3), np.uint8), "")


def test_the_answer_is_no_where_a_point_failed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def when(point: object, number: int) -> None:
        if number == 2:
            raise RuntimeError("no memory left")

    explorer = SweepExplorer({"fps": [7, 14]}, SMALL, model=str(tiny), image=PICTURE)
    failing(monkeypatch, when)
    page = explorer.page()
    assert len(films(page)) == 1 and "no memory left" in page
    assert "failed" in [cell for row in rows(page) for cell in row]
    monkeypatch.setattr("svdlab.notebook.sweep_board.SweepExplorer.run", lambda self: Sweep.open(self.out))
    assert not explorer.answer()["passed"]


def test_a_heat_map_is_its_numbers(explorer: SweepExplorer) -> None:
    sweep, page = explorer.run(), explorer.page()
    view, table = View(sweep), explorer.run().table().set_index("point")
    assert (view.x, view.down) == ("max_guidance_scale", ["fps"])
    titles = {
        "Motion": "motion",
        "Difference along fps": "difference_fps",
        "Difference along max guidance scale": "difference_max_guidance_scale",
    }
    for title, column in titles.items():
        assert cells(page, title) == {identity: f"{table[column][identity]:.3g}" for identity in sweep.plan.points}
    turned = View(sweep, x="fps").rows()
    assert [head for head, _ in turned] == ["1", "3"]
    assert [i for _, i in turned] == [list(column) for column in zip(*(i for _, i in view.rows()), strict=True)]
    unknown = HeatMap("m", "unit", [("", [("a", 1.0), ("b", None), (None, None)])], lambda value: "#ffffff")
    assert rows(unknown.html(["1", "2", "3"]))[1:] == [["", "1", "–", ""]]


def test_one_colour_means_one_number(explorer: SweepExplorer) -> None:
    maps = {m.title: m for m in Board(explorer.run())._maps(View(explorer.run()))}
    one, other = (m for title, m in maps.items() if title.startswith("Difference"))
    assert one.shade(0.5) == other.shade(0.5) != one.shade(0.0), "differences share their colours, from zero"


def test_the_distance_from_diffusers_is_judged_at_four(tiny: Path, tmp_path: Path) -> None:
    axes = {"seed": [0, 1], "fps": [7, 9], "rules": ["none", "fps_not_decremented"]}
    changes = grid(axes)
    sweep = run_sweep(tmp_path, changes, SMALL, model=str(tiny), image=PICTURE, divergence=True)
    html = Board(sweep).html(View(sweep))
    (table,) = re.findall(
        r"<table><caption>Distance from diffusers<small>noise ratio; parity is up to 4<.*?</table>", html
    )
    said = dict(re.findall(r"data-point='(\w+)'.*?<small>(\w+)</small>", table))
    assert said == {identity: sweep.metrics(identity)["divergence"]["verdict"] for identity in sweep.plan.points}
    assert sorted(set(said.values())) == ["divergence", "parity"]
    for identity in sweep.plan.points:  # three axes: a line for each point
        assert html.count(f'<g data-point="{identity}"') == 1
    assert "<style" not in parallel_svg(sweep, list(sweep.plan.points)), "it would be of the whole page"


def test_further_axes_go_down_or_are_held_at_a_value(tiny: Path, tmp_path: Path) -> None:
    axes = {"seed": [0, 1], "fps": [7], "rules": ["none", "gelu_tanh"]}
    sweep = run_sweep(tmp_path, grid(axes), SMALL, model=str(tiny), image=PICTURE)
    at = {(s, r): sweep.at(seed=s, rules=r) for s in (0, 1) for r in ("none", "gelu_tanh")}
    assert View(sweep).rows() == [
        ("seed 0, fps 7", [at[0, "none"], at[0, "gelu_tanh"]]),
        ("seed 1, fps 7", [at[1, "none"], at[1, "gelu_tanh"]]),
    ]
    held = View(sweep, x="seed", where={"rules": "gelu_tanh"})
    assert held.rows() == [("7", [at[0, "gelu_tanh"], at[1, "gelu_tanh"]])] and held.heads() == ["0", "1"]
    listed = run_sweep(tmp_path / "l", grid(axes)[:3], SMALL, model=str(tiny), image=PICTURE)
    assert View(listed).rows()[1][1][1] is None and "no point" in Board(listed).html(View(listed))


def test_two_sweeps_side_by_side(explorer: SweepExplorer, tiny: Path, tmp_path: Path) -> None:
    before = explorer.run()
    other = SMALL.replace(seed=1)
    after = run_sweep(tmp_path / "a", grid(AXES)[:3], other, model=str(tiny), image=PICTURE)
    html = comparison_html(before, after)
    names = [place_of(before, identity) for identity in before.plan.points]
    assert films(html) == [names[0], names[1], names[0], names[1], names[2], names[2]]
    assert "3 of 3 points moved, 0 are the same to the last bit" in html and "not in both" in html
    assert html.count(">changed<") == 3
    shown = cells(html, "Largest change")
    assert set(shown) == set(before.plan.points)
    assert [text for text in shown.values()].count("–") == 1, "the point that the second does not have"
    row = run_sweep(tmp_path / "r", grid(AXES)[:2], other, model=str(tiny), image=PICTURE)
    assert films(comparison_html(before, row)) == [*names[:2], *names[:2]], "only the row that both have"
    assert comparison_html(before, before).count(">the same<") == 4


def test_the_panel_runs_what_is_picked(panel: SweepPanel) -> None:
    panel.show()
    assert panel.sweep is None and not panel.status.value, "a checkpoint that may be large waits for Run"
    pick(panel, ("fps", "7, 14"), ("max_guidance_scale", "1, 3"))
    panel.run.click()
    panel.worker.join()
    assert "done, 4 of 4 points" in panel.status.value and panel.stop.disabled
    names = [f"fps {f}, max guidance scale {g:g}" for f in (7, 14) for g in (1, 3)]
    assert films(panel.board.html) == names
    panel.x.value = "fps"
    assert films(panel.board.html) == [names[i] for i in (0, 2, 1, 3)]
    panel.held["max_guidance_scale"].value = 3.0
    assert films(panel.board.html) == [names[1], names[3]]


def test_a_sweep_is_kept_resumed_extended_and_never_mixed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("svdlab.notebook.sweep_board.is_live", lambda: True)
    tried = failing(monkeypatch, lambda point, number: None)

    def run(**axes: list[int]) -> Path:
        panel = SweepPanel(SweepExplorer({"fps": [7, 14]}, SMALL, model=str(tiny), image=PICTURE))
        assert panel.folder.value == "sweeps/fps"
        pick(panel, *((name, values_text(values)) for name, values in axes.items()))
        panel.run.click()
        panel.worker.join()
        assert f"Kept in {panel.sweep.folder.absolute()}" in panel.kept.value
        assert ("sweeps/fps holds another sweep" in panel.kept.value) is panel.sweep.folder.name.startswith("fps-")
        return panel.sweep.folder

    assert run(fps=[7, 14]) == Path("sweeps/fps") and run(fps=[7, 14]) == Path("sweeps/fps") and tried == [7, 14]
    assert run(fps=[7, 14, 21]) == Path("sweeps/fps") and tried == [7, 14, 21], "extended by one point"
    assert run(fps=[7, 28]) == Path("sweeps/fps-2"), "which would leave two of three points without a place"
    assert run(fps=[28, 7]) == Path("sweeps/fps-2") and tried == [7, 14, 21, 7, 28]
    assert run(seed=[1, 2]) == Path("sweeps/seed"), "named after the axes"
    assert len(list(Path("sweeps/fps/points").iterdir())) == 3
    (tmp_path / "sweeps/fps-2/sweep.json").write_text("{")
    assert run(fps=[7, 28]) == Path("sweeps/fps-3"), "what is damaged is left for who can mend it"


def test_bugs_are_picked_from_the_catalogue(panel: SweepPanel) -> None:
    pick(panel, ("rules", ""))
    row = panel.rows[0]
    assert row.names.layout.display is None and panel.rows[1].names.layout.display == "none"
    row.names.value = ("fps_not_decremented", "gelu_tanh")
    assert panel.picked() == {"rules": ["none", "fps_not_decremented", "gelu_tanh"]}
    assert BUGS["gelu_tanh"].cause in row.about.value


def test_approximations_are_picked_from_those_there_are(panel: SweepPanel) -> None:
    pick(panel, ("rules", ""))
    panel.rows[0].names.value = ("gelu_tanh",)
    pick(panel, ("approximation", ""))
    assert panel.rows[0].names.options == tuple(APPROXIMATIONS)
    panel.rows[0].names.value = ("deep_features",)
    assert panel.picked() == {"approximation": ["none", "deep_features"]}
    assert escape(APPROXIMATIONS["deep_features"].said) in panel.rows[0].about.value


def test_ranges_and_unusual_values(panel: SweepPanel) -> None:
    pick(panel, ("fps", "7:28:7, 60"))
    assert panel.picked() == {"fps": [7, 14, 21, 28, 60]}
    assert "fps: 60: unusual, most take 1 to 30" in panel.rows[0].about.value
    pick(panel, ("fps", "5-9"))
    assert panel.picked() == {"fps": [5, 6, 7, 8, 9]} and "unusual" not in panel.rows[0].about.value


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("fps", "7, 0")], "fps: got 0, allowed: integer &gt;= 1"),
        ([("fps", "")], "fps: got no values"),
        ([("fps", "9-5")], "fps: got the range &#x27;9-5&#x27;, allowed: one that rises"),
        ([("fps", "7"), ("fps", "8")], "fps, fps: one twice"),
        ([("rules", "gelu")], "rules: got &#x27;gelu&#x27;, allowed: none"),
        ([], "axes: got none"),
    ],
)
def test_what_is_not_allowed_is_said(panel: SweepPanel, rows: list[tuple[str, str]], message: str) -> None:
    pick(panel, *rows)
    panel.run.click()
    assert message in panel.status.value and "role='alert'" in panel.status.value
    assert not panel.explorer.out.exists()


def test_stop_and_run_again(panel: SweepPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    def when(point: object, number: int) -> None:
        if number == 3:
            panel.stop.click()

    tried = failing(monkeypatch, when)
    panel.compute()
    panel.worker.join()
    assert "stopped, 2 of 4 points" in panel.status.value
    assert len(films(panel.board.html)) == 2 and panel.board.html.count("not computed") == 2
    panel.compute()
    panel.worker.join()
    assert "done, 4 of 4 points" in panel.status.value and tried == [7, 7, 14, 14, 14]


def test_an_earlier_sweep_is_loaded(panel: SweepPanel, explorer: SweepExplorer, tmp_path: Path) -> None:
    other = run_sweep(
        tmp_path / "other", grid({"seed": [3, 4, 5]}), SMALL, model=explorer.options["model"], image=PICTURE
    )
    panel.folder.value = str(other.folder)
    panel.load.click()
    assert "loaded, 3 of 3 points" in panel.status.value and len(films(panel.board.html)) == 3
    assert [(r.axis.value, r.entry.value) for r in panel.rows][:2] == [("seed", "3, 4, 5"), ("(no axis)", "")]
    panel.other.value = str(other.folder)
    panel.compare.click()
    assert films(panel.comparison.html) == [f"seed {n}" for n in (3, 4, 5) * 2]
    panel.other.value = str(explorer.run().folder)
    panel.compare.click()
    assert "allowed: two sweeps over the same axes" in panel.status.value
    panel.folder.value = str(tmp_path / "nothing")
    panel.load.click()
    assert "no sweep" in panel.status.value


def test_what_is_shown_is_exported(panel: SweepPanel, explorer: SweepExplorer, tmp_path: Path) -> None:
    panel.export.click()
    assert "file: there is no sweep yet, allowed: Run or Load first" in panel.status.value
    other = run_sweep(
        tmp_path / "six", grid({"seed": [3, 4, 5], "fps": [7, 9]}), SMALL, model=explorer.options["model"]
    )
    panel.open(str(other.folder))
    panel.held["seed"].value = 4
    panel.export.click()
    assert f"written to {other.folder / 'board.html'}" in panel.status.value
    assert (
        films((other.folder / "board.html").read_text()) == films(panel.board.html)
        and len(films(panel.board.html)) == 2
    )
    panel.file.value = str(tmp_path / "two.gif")
    panel.export.click()
    assert Image.open(tmp_path / "two.gif").n_frames == SMALL.num_frames
    panel.file.value = "board.png"
    panel.export.click()
    assert "allowed: .html, .gif" in panel.status.value


def test_an_error_is_shown_whole(panel: SweepPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdlab.notebook.sweep_board.run_sweep", None)
    panel.compute()
    panel.worker.join()
    assert "TypeError" in panel.status.value and "Traceback" in panel.status.value and panel.stop.disabled


def test_two_threads_wait_for_each_other(explorer: SweepExplorer) -> None:
    thread = threading.Thread(target=explorer.run)
    thread.start()
    explorer.run()
    thread.join()


def test_axes_are_refused_when_they_are_made() -> None:
    with pytest.raises(SvdlabError, match="fps: got 0"):
        SweepExplorer({"fps": [0]})
    assert values_text([1.0, None, "x"]) == "1, none, x" and values_text([(2.0, 0.0)]) == "[[2.0, 0.0]]"
