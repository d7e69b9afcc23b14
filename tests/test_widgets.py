"""The sliders: made from the settings, one computation at a time, and what they say is what is computed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from html_tables import rows
from PIL import Image
from torch import nn

from svdlab.errors import SvdlabError
from svdlab.notebook.controls import control, help_of, is_live
from svdlab.notebook.diagnoser import Diagnoser
from svdlab.notebook.explorer import Explorer, ExplorerPanel
from svdlab.notebook.panel import Panel
from svdlab.notebook.tables import ratio_text
from svdlab.notebook.worker import Worker
from svdlab.parity import capture
from svdlab.parity.lab import Cancelled, Lab
from svdlab.parity.three_way import three_way
from svdlab.svd.settings import GenerationSettings

BUG = "fps_not_decremented"


@pytest.fixture(scope="module")
def lab(tiny: Path) -> Lab:
    return Lab(str(tiny), image=Image.linear_gradient("L").convert("RGB").resize((48, 32)))


@pytest.fixture
def explorer(lab: Lab) -> Explorer:
    settings = lab.settings(num_frames=2, num_inference_steps=2, height=32, width=32)
    return Explorer(
        lab, settings, [BUG], ["fps", "min_guidance_scale", "max_guidance_scale"], [{"fps": 3}, {"fps": 20}]
    )


@pytest.fixture
def panel(explorer: Explorer) -> ExplorerPanel:
    made = ExplorerPanel(explorer)
    made.worker.delay = 0.0
    return made


def test_a_control_is_made_from_its_setting() -> None:
    fps, guidance, cfg = control("fps", 7), control("min_guidance_scale", 1.0), control("cfg", "batched")
    assert (fps.min, fps.max, fps.step, fps.value) == (1, 30, 1, 7)
    assert (guidance.min, guidance.max, guidance.step) == (0, 10, 0.1)
    assert cfg.options == ("batched", "sequential")
    assert "fed fps - 1" in fps.tooltip and "1/s" in help_of("fps")
    assert control("fps", 60).max == 60
    assert control("decode_chunk_size", 2, high=8).max == 8
    for name in ("sigmas", "speed"):
        with pytest.raises(SvdlabError, match=name):
            control(name, 1)


def test_the_newest_request_wins_and_none_runs_beside_another() -> None:
    worker, running, most, done = Worker(0.0), 0, 0, []
    started = threading.Event()

    def work(name: int, stop: threading.Event) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        started.set()
        if name == 0:
            assert stop.wait(10), "a newer request stops the older one"
        done.append((name, stop.is_set()))
        running -= 1

    worker.submit(lambda stop: work(0, stop))
    assert started.wait(10)
    for name in (1, 2, 3):
        worker.submit(lambda stop, name=name: work(name, stop))
    worker.join()
    assert most == 1
    assert done == [(0, True), (3, False)], "what was asked for in between is never run"


def test_the_worker_survives_a_stop_and_waits_for_the_hand_to_rest() -> None:
    worker, done = Worker(0.05), []
    for name in range(5):
        worker.submit(lambda stop, name=name: done.append(name))
    worker.join()
    assert done == [4]
    worker.submit(lambda stop: done.append("dropped"))
    worker.stop()
    worker.join()
    worker.submit(lambda stop: done.append(5))
    worker.join()
    assert done == [4, 5]


def test_whatever_ends_a_run_is_said() -> None:
    panel = Panel(delay=0.0)

    def refused(stop: threading.Event) -> str:
        raise SvdlabError("fps: got <0>")

    def cancelled(stop: threading.Event) -> str:
        raise Cancelled

    def broken(stop: threading.Event) -> str:
        raise RuntimeError("<boom>")

    for work, said in ((lambda stop: "2 < 3", "2 &lt; 3"), (refused, "got &lt;0&gt;"), (cancelled, "stopped")):
        panel.submit(work)
        panel.worker.join()
        assert said in panel.status.value and "Traceback" not in panel.status.value
    panel.submit(broken)
    panel.worker.join()
    assert "&lt;boom&gt;" in panel.status.value and "Traceback" in panel.status.value and panel.stop.disabled


def test_the_number_is_what_the_package_computes(panel: ExplorerPanel, lab: Lab, tiny: Path) -> None:
    panel.show()
    panel.worker.join()
    before = shown(panel)
    panel.controls["fps"].value = 9
    panel.worker.join()
    assert all(a != b for a, b in zip(before, shown(panel), strict=True))
    settings = panel.explorer.start.replace(fps=9)
    own = three_way(str(tiny), lab.image, settings)
    assert f"<output>{ratio_text(own)}</output>, parity" in panel.number.value
    panel.fix.value = False
    off = lab.case(settings, BUG).off
    assert off.verdict == "divergence" and off.first_divergence == "added_time_ids"
    assert f"<output>{ratio_text(off)}</output>, divergence" in panel.number.value
    assert "fix off" in str(shown(panel)[2])


def shown(panel: ExplorerPanel) -> tuple[object, ...]:
    """The number, the plot and the clips."""
    (player,) = panel.clips.children
    return panel.number.value, panel.plot.value, player.content["clips"]


def test_what_was_computed_is_kept(panel: ExplorerPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    panel.show()
    panel.worker.join()
    monkeypatch.setattr("svdlab.parity.lab.capture", None)
    panel.controls["fps"].value = 8
    panel.controls["fps"].value = 7
    panel.worker.join()
    assert "done" in panel.status.value, panel.status.value


def stale(panel: ExplorerPanel) -> tuple[bool, bool]:
    """Whether the plot and the clips are dimmed; ``test_browser`` asks the browser."""
    return tuple("svdlab-stale" in widget._dom_classes for widget in (panel.plot, panel.clips))  # type: ignore[return-value]


def test_stop_leaves_at_once_and_breaks_nothing(panel: ExplorerPanel) -> None:
    said: list[str] = []

    def stop_in_the_middle(change: dict[str, str]) -> None:
        said.append(change["new"])
        if "float64, step 1" in change["new"]:
            panel.stop.click()

    panel.compute()
    panel.worker.join()
    assert stale(panel) == (False, False)
    panel.status.observe(stop_in_the_middle, "value")
    panel.controls["fps"].value = 11
    panel.worker.join()
    assert "stopped" in said[-1] and not any("step 2" in s for s in said if "float64" in s)
    assert "being measured" in panel.number.value
    assert stale(panel) == (True, False), "the plot is that of an earlier case, the clips are what the caption says"
    assert not nn.modules.module._global_forward_pre_hooks
    assert "fps 11," in panel.caption.value, "what is shown is what was computed"
    panel.status.unobserve_all()
    panel.controls["fps"].value = 13
    panel.stop.click()
    panel.worker.join()
    assert "fps 11," in panel.caption.value, "and not where the slider stands"
    panel.compute()
    panel.worker.join()
    assert ", parity" in panel.number.value and panel.stop.disabled and stale(panel) == (False, False)


def test_an_error_is_shown_in_the_widget(panel: ExplorerPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    panel.controls["min_guidance_scale"].value = 3.0
    panel.controls["max_guidance_scale"].value = 1.0
    panel.worker.join()
    assert "diffusers fails at a ramp from 3 to 1" in panel.status.value
    monkeypatch.setattr(panel.explorer.lab, "cases", None)
    panel.controls["max_guidance_scale"].value = 2.0
    panel.worker.join()
    assert "TypeError" in panel.status.value and "Traceback" in panel.status.value


def test_a_large_checkpoint_waits_for_run(panel: ExplorerPanel) -> None:
    panel.explorer.live = False
    panel.controls["fps"].value = 12
    assert "press Run" in panel.status.value and panel.case is None
    panel.run.click()
    panel.worker.join()
    assert panel.case is not None and panel.case.settings.fps == 12


def test_a_page_without_a_hand_says_what_the_widget_would(explorer: Explorer, lab: Lab) -> None:
    assert not is_live()
    page = explorer._repr_mimebundle_()["text/html"]
    _, *grid = rows(page)
    assert [row[0] for row in grid] == ["3", "20"]
    for settings in (explorer.start, *(explorer.start.replace(fps=fps) for fps in (3, 20))):
        case = lab.case(settings, BUG)
        assert ratio_text(case.on) in page and ratio_text(case.off) in page
    assert page.count("<figure") == 2 + 2 and page.count("<img") == 2 + 2 * 3, "two charts, two players"
    answer = explorer.answer()
    assert answer["passed"] and answer["settings_seen"] == 3
    (fix,) = answer["fixes"]
    assert fix["bug"] == BUG and fix["first_divergence"] == "added_time_ids"
    assert fix["ratio_on"] <= answer["worst_ratio_fix_on"] <= 4 < fix["ratio_off"]


def test_only_the_broken_fix_is_blamed(explorer: Explorer, lab: Lab, tiny: Path) -> None:
    other = Lab(str(tiny), image=lab.image)
    other.pipe = other.pipe.with_bugs(BUG)
    blamed, spared = (Explorer(other, explorer.start, [bug], ["fps"]).answer() for bug in (BUG, "timestep_unscaled"))
    assert not blamed["passed"]
    assert spared["passed"] and spared["diverges_elsewhere"] == "added_time_ids"


def test_a_bug_below_the_noise_is_no_failure_and_is_named(lab: Lab, explorer: Explorer) -> None:
    level = explorer.start.replace(min_guidance_scale=2.0, max_guidance_scale=2.0)
    answer = Explorer(lab, level, ["guidance_per_step", BUG], ["fps"]).answer()
    assert answer["passed"] and answer["bugs_below_the_noise"] == "guidance_per_step"


def test_one_reference_serves_what_diffusers_does_not_know(lab: Lab) -> None:
    settings = GenerationSettings(num_frames=2, num_inference_steps=1, height=32, width=32)
    reference = lab.reference(settings)
    for same in ({"cfg": "sequential"}, {"decode": "exact", "decode_chunk_size": 1}, {"decode_chunk_size": 2}):
        assert lab.reference(settings.replace(**same)) is reference
    assert lab.reference(settings.replace(decode_chunk_size=1)) is not reference


def test_a_reader_finds_the_bug_in_their_own_file(lab: Lab, tmp_path: Path) -> None:
    settings = lab.settings(num_frames=2, num_inference_steps=1, height=32, width=32)
    panel = Diagnoser(lab.pipe, lab.reference(settings), lab.truth(settings))
    assert "<img" not in panel._repr_mimebundle_()["text/html"], "a page has no kernel"
    panel.target.value = str(tmp_path / "reference.safetensors")
    panel.write.click()
    panel.worker.join()
    assert f"wrote {panel.target.value}" in panel.status.value
    port = str(tmp_path / "port.safetensors")
    reference = lab.reference(settings)
    buggy = lab.pipe.with_bugs(BUG)
    capture(buggy, replay=reference, preprocess=True, until="noise_pred.000", path=port)
    for name, said in ((str(tmp_path / "none"), "none"), (port, "done")):
        panel.source.value = name
        panel.diagnose.click()
        panel.worker.join()
        assert said in panel.status.value, panel.status.value
    assert all(said in panel.found.value for said in (f"<p>{BUG}: no bug", "fed fps instead of fps - 1", "<img"))
