"""The sweep's panel and page: what they show is what is in the folder."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import numpy as np
import pytest
from html_tables import rows
from test_sweep import AXES, PICTURE, SMALL, failing

from svdlab.errors import SvdlabError
from svdlab.notebook.sweep_board import SweepExplorer, SweepPanel
from svdlab.notebook.sweep_view import View, plot_heatmaps, values_text
from svdlab.sweep import Sweep, grid, run_sweep


@pytest.fixture(scope="module")
def explorer(tiny: Path) -> SweepExplorer:
    return SweepExplorer(AXES, SMALL, model=str(tiny), image=PICTURE)


@pytest.fixture
def panel(tiny: Path, tmp_path: Path) -> SweepPanel:
    return SweepPanel(SweepExplorer(AXES, SMALL, model=str(tiny), image=PICTURE, out=tmp_path / "out"))


def pick(panel: SweepPanel, *rows: tuple[str, str]) -> None:
    for (axis, entry, _), (name, values) in zip(panel.rows, [*rows, *[("(no axis)", "")] * 3], strict=False):
        axis.value, entry.value = name, values


def test_a_page_shows_every_clip_and_its_numbers(explorer: SweepExplorer) -> None:
    page = explorer._repr_mimebundle_()["text/html"]
    names = re.findall(r'<img [^>]*alt="(fps [^"]+)"', page)
    assert names == [f"fps {f}, max guidance scale {g:g}" for f in (7, 14) for g in (1, 3)]
    assert page.count('<img style="height:120px') == 4 and page.count("<picture") == 1
    assert page.count("data:image/png") == 1
    assert "One point: fps 14, max guidance scale 3" in page, "the middle"
    answer = explorer.answer()
    assert answer["passed"] and answer["points"] == 4 and answer["the_same_to_the_last_bit"] == 2
    assert answer["mean_difference_fps"] == pytest.approx(explorer.run().table()["difference_fps"].mean())


def test_the_answer_is_no_where_a_point_failed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def when(point: object, number: int) -> None:
        if number == 2:
            raise RuntimeError("no memory left")

    explorer = SweepExplorer({"fps": [7, 14]}, SMALL, model=str(tiny), image=PICTURE)
    failing(monkeypatch, when)
    page = explorer.page()
    assert page.count("data:image/webp") == 1 and "no memory left" in page
    assert "failed" in [cell for row in rows(page) for cell in row]
    monkeypatch.setattr("svdlab.notebook.sweep_board.SweepExplorer.run", lambda self: Sweep.open(self.out))
    assert not explorer.answer()["passed"]


def test_a_heat_map_is_its_numbers(explorer: SweepExplorer) -> None:
    sweep = explorer.run()
    view = View(sweep)
    assert (view.x, view.y) == ("max_guidance_scale", "fps")
    motion, by_fps, by_guidance = view.plot().axes
    table = sweep.table()
    for ax, column in ((motion, "motion"), (by_fps, "difference_fps"), (by_guidance, "difference_max_guidance_scale")):
        expected = table[column].to_numpy(dtype=float).reshape(2, 2)
        (image,) = ax.get_images()
        assert np.allclose(image.get_array(), expected)
        assert [t.get_text() for t in ax.texts] == [f"{v:.3g}" for v in expected.flat]
        assert ax.get_xlabel() == "max guidance scale" and image.norm.vmin == 0
    shared = {ax.get_images()[0].norm.vmax for ax in (by_fps, by_guidance)}
    assert shared == {table[["difference_fps", "difference_max_guidance_scale"]].max().max()}
    turned = View(sweep, x="fps", y="max_guidance_scale").square()
    assert turned == [list(column) for column in zip(*view.square(), strict=True)]
    gap = plot_heatmaps({"m": ("unit", np.array([[1.0, np.nan]]))}, ("x", ["1", "2"]), ("", [""]))
    assert [t.get_text() for t in gap.axes[0].texts] == ["1", ""] and gap.alt


def test_a_third_axis_is_held_at_a_value(tiny: Path, tmp_path: Path) -> None:
    axes = {"seed": [0, 1], "fps": [7], "rules": ["none", "gelu_tanh"]}
    sweep = run_sweep(tmp_path, grid(axes), SMALL, model=str(tiny), image=PICTURE)
    assert View(sweep).square() == [[sweep.at(seed=0, rules="none"), sweep.at(seed=0, rules="gelu_tanh")]]
    held = View(sweep, x="seed", y="fps", where={"rules": "gelu_tanh"}).square()
    assert held == [[sweep.at(seed=0, rules="gelu_tanh"), sweep.at(seed=1, rules="gelu_tanh")]]


def test_the_panel_runs_what_is_picked(panel: SweepPanel) -> None:
    panel.show()
    assert panel.sweep is None and not panel.status.value, "a checkpoint that may be large waits for Run"
    pick(panel, ("fps", "7, 14"), ("max_guidance_scale", "1, 3"))
    panel.run.click()
    panel.worker.join()
    assert "done, 4 of 4 points" in panel.status.value and panel.stop.disabled
    assert [button.tooltip for button in panel.cells.values()] == [
        f"fps {f}, max guidance scale {g:g}" for f in (7, 14) for g in (1, 3)
    ]
    assert not any(button.disabled for button in panel.cells.values())
    assert all("image/webp" in style.value for style in panel.styles.values())
    assert "<img" in panel.heat.value

    identity = panel.sweep.at(fps=14, max_guidance_scale=1.0)
    panel.cells[identity].click()
    assert "fps 14, max guidance scale 1" in panel.chosen.value and "<picture" in panel.chosen.value
    assert f"{panel.sweep.metrics(identity)['motion']:.3g} grey levels" in panel.chosen.value

    across = list(panel.cells)
    panel.x.value, panel.y.value = "fps", "max_guidance_scale"
    assert list(panel.cells) == [across[i] for i in (0, 2, 1, 3)]

    pick(panel, ("fps", "14, 21"))
    panel.run.click()
    panel.worker.join()
    assert "done, 2 of 2 points" in panel.status.value and "3 earlier points" in panel.status.value


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("fps", "7, 0")], "fps: got 0, allowed: integer &gt;= 1"),
        ([("fps", "")], "fps: got no values"),
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
    assert [button.disabled for button in panel.cells.values()] == [False, False, True, True]
    panel.compute()
    panel.worker.join()
    assert "done, 4 of 4 points" in panel.status.value and tried == [7, 7, 14, 14, 14]


def test_an_earlier_sweep_is_loaded(panel: SweepPanel, explorer: SweepExplorer, tmp_path: Path) -> None:
    other = run_sweep(
        tmp_path / "other", grid({"seed": [3, 4, 5]}), SMALL, model=explorer.options["model"], image=PICTURE
    )
    panel.folder.value = str(other.folder)
    panel.load.click()
    assert "loaded, 3 of 3 points" in panel.status.value and len(panel.cells) == 3
    assert [(axis.value, entry.value) for axis, entry, _ in panel.rows][:2] == [("seed", "3, 4, 5"), ("(no axis)", "")]
    panel.folder.value = str(tmp_path / "nothing")
    panel.load.click()
    assert "no sweep" in panel.status.value


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
