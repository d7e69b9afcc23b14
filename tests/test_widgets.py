"""The sliders: made from the settings, one computation at a time, and what they say is what is computed."""

from __future__ import annotations

import base64
import io
import re
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import ipywidgets
import pytest
import torch
from html_tables import rows
from PIL import Image
from torch import nn

from svdlab.errors import SvdlabError
from svdlab.notebook.controls import control, help_of, is_live
from svdlab.notebook.diagnoser import Diagnoser, writers
from svdlab.notebook.explorer import Explorer, ExplorerPanel
from svdlab.notebook.panel import Panel
from svdlab.notebook.players import Player, case_clips
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


def test_the_panel_begins_with_the_bug_and_its_number_is_what_the_package_computes(
    panel: ExplorerPanel, lab: Lab, tiny: Path
) -> None:
    panel.show()
    panel.worker.join()
    assert panel.which.value == "off", "so that there is something to see"
    before = shown(panel)
    panel.controls["fps"].value = 9
    panel.worker.join()
    assert all(a != b for a, b in zip(before, shown(panel), strict=True))
    settings = panel.explorer.start.replace(fps=9)
    off = lab.case(settings, BUG).off
    assert off.verdict == "divergence" and off.first_divergence == "added_time_ids"
    assert f">{ratio_text(off)}</output>, divergence" in panel.number.value
    (player,) = panel.clips.children
    before = shown(panel)
    panel.which.value = "on"
    assert f">{ratio_text(three_way(str(tiny), lab.image, settings))}</output>, parity" in panel.number.value
    assert panel.clips.children == (player,) and titles(panel)[1] == "svdlab, fix on", "in place"
    assert shown(panel)[1] == before[1] and shown(panel)[2] != before[2], "the plot has both lines, the clip one"


def shown(panel: ExplorerPanel) -> tuple[object, ...]:
    """The number, the plot and the clips."""
    (player,) = panel.clips.children
    return panel.number.value, panel.plot.content, player.content["clips"]


def titles(panel: ExplorerPanel) -> list[str]:
    return [clip["title"] for clip in panel.clips.children[0].content["clips"]]


def test_a_click_in_the_plot_shows_that_tensor_of_what_is_shown(panel: ExplorerPanel) -> None:
    sent = panel.plot._handle_custom_msg
    sent({"probe": "frames"}, [])
    assert panel.inspector is None, "nothing is there yet"
    panel.show()
    panel.worker.join()
    sent({"probe": "latents.001"}, [])
    inspector = panel.inspector
    assert inspector in panel.inspected.children

    def check(probe: str, name: str) -> None:
        assert inspector.view["probe"] == panel.plot.chosen == probe and inspector.look["names"]["candidate"] == name
        traces = panel.case.comparison(panel.which.value).traces
        for role in ("reference", "candidate"):
            shown = torch.frombuffer(bytearray(inspector.view[role]), dtype=torch.float32)
            assert torch.equal(shown, traces[role][probe][tuple(inspector.view["index"])].flatten())

    check("latents.001", "svdlab, fix off")
    inspector.asked = {"probe": "noise_pred.000", "index": [0, 1, 2], "against": "reference", "turn": 1}
    before = inspector.view["candidate"]
    panel.which.value = "on"
    check("noise_pred.000", "svdlab, fix on")
    assert inspector.view["index"] == [0, 1, 2] and inspector.view["candidate"] != before, "the same place"
    before = inspector.view["reference"]
    panel.controls["fps"].value = 9
    panel.worker.join()
    check("noise_pred.000", "svdlab, fix on")
    assert inspector.view["index"] == [0, 1, 2] and inspector.view["reference"] != before
    assert panel.inspector is inspector, "in place"
    panel.reset.click()
    panel.worker.join()
    assert panel.inspector is None and not panel.inspected.children and not panel.plot.chosen


def test_a_pinned_clip_is_compared_with_what_comes(panel: ExplorerPanel) -> None:
    panel.show()
    panel.worker.join()
    ours = shown(panel)[2][1]["src"]
    panel.pin.click()
    panel.which.value = "on"
    panel.controls["fps"].value = 9
    panel.worker.join()
    assert titles(panel)[:2] == [f"A: fix off, fps {panel.explorer.start.fps}", "B: fix on, fps 9"]
    assert shown(panel)[2][0]["src"] == ours, "the clip that was pinned"
    panel.reset.click()
    panel.worker.join()
    assert panel.controls["fps"].value == panel.explorer.start.fps and panel.which.value == "off"
    assert titles(panel)[:2] == ["diffusers", "svdlab, fix off"] and shown(panel)[2][1]["src"] == ours


@pytest.mark.parametrize("which", ["off", "own"])
def test_the_copied_code_makes_what_is_shown(lab: Lab, which: str) -> None:
    settings = lab.settings(num_frames=2, num_inference_steps=1, height=32, width=32)
    panel = ExplorerPanel(Explorer(lab, settings, [BUG], ["fps"], stages={"time_ids": two_less}))
    panel.worker.delay, panel.which.value, panel.seed.value = 0.0, which, 3
    panel.show()
    panel.worker.join()
    scope = {"image": lab.image}
    exec(panel.snippet.code, scope)
    assert scope["case"].settings == panel.case.settings and panel.case.settings.seed == 3
    made = Player(case_clips(scope["case"], which), settings.fps).content["clips"]
    assert made == shown(panel)[2], panel.snippet.code


def two_less(settings: GenerationSettings) -> torch.Tensor:
    return torch.tensor([[settings.fps - 2, settings.motion_bucket_id, settings.noise_aug_strength]])


def test_a_readers_own_function_is_a_third_choice(lab: Lab) -> None:
    settings = lab.settings(num_frames=2, num_inference_steps=1, height=32, width=32)
    with pytest.raises(SvdlabError, match="stage: got 'time_id', allowed: .*time_ids"):
        Explorer(lab, settings, [BUG], ["fps"], stages={"time_id": two_less})
    page = Explorer(lab, settings, [BUG], ["fps"], stages={"time_ids": two_less}).page()
    own = lab.case(settings, BUG, {"time_ids": two_less}).own
    right = lab.candidate(settings.replace(fps=settings.fps - 1))["frames"]
    assert own is not None and torch.equal(own.traces["candidate"]["frames"], right), (
        "fed one less: the clip of one less"
    )
    assert f">{ratio_text(own)}</output>, divergence" in page and page.count('<figure class="svdlab-player') == 2
    fixed = lab.case(settings, BUG, {"time_ids": lambda settings: two_less(settings) + torch.tensor([[1, 0, 0]])}).own
    assert fixed is not None and fixed.verdict == "parity", "not what an earlier function gave"


def test_an_image_of_the_readers(panel: ExplorerPanel, tmp_path: Path) -> None:
    panel.show()
    panel.worker.join()
    before = shown(panel)

    def upload(name: str, data: bytes) -> None:
        file = {"name": name, "type": "image/png", "size": len(data), "content": memoryview(data)}
        panel.upload.value = [{**file, "last_modified": datetime.now(timezone.utc)}]
        panel.worker.join()

    upload("<no>.png", b"no image")
    assert "&lt;no&gt;.png: not an image that can be read" in panel.refused.value and shown(panel) == before
    buffer = io.BytesIO()
    picture = Image.radial_gradient("L").convert("RGB").resize((48, 32))
    picture.save(buffer, "PNG")
    upload("mine.png", buffer.getvalue())
    assert "mine.png" in panel.caption.value and shown(panel)[2] != before[2] and panel.refused.value == ""
    picture.save(tmp_path / "mine.png")
    scope: dict[str, Any] = {}
    exec(panel.snippet.code.replace("'mine.png'", repr(str(tmp_path / "mine.png"))), scope)
    made = Player(case_clips(scope["case"], "off"), 7).content["clips"]
    assert made == shown(panel)[2]
    panel.reset.click()
    panel.worker.join()
    assert shown(panel)[2] == before[2] and "mine.png" not in panel.caption.value


def test_what_was_computed_is_kept(panel: ExplorerPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    panel.show()
    panel.worker.join()
    monkeypatch.setattr("svdlab.parity.lab.capture", None)
    panel.controls["fps"].value = 8
    panel.controls["fps"].value = 7
    panel.worker.join()
    assert "done" in panel.status.value, panel.status.value


def stale(panel: ExplorerPanel) -> bool:
    """Whether what is shown is dimmed, all of it or nothing; ``test_browser`` asks the browser."""
    (dimmed,) = {
        "svdlab-stale" in w._dom_classes
        for w in (panel.number, panel.drawn, panel.clips, panel.copied, panel.inspected)
    }
    assert dimmed or panel.back.layout.display == "none"
    return dimmed


def test_stop_leaves_at_once_and_breaks_nothing(panel: ExplorerPanel) -> None:
    said: list[str] = []
    stop_at = "float64, step 1"

    def stop_in_the_middle(change: dict[str, str]) -> None:
        said.append(change["new"])
        if stop_at in change["new"]:
            panel.stop.click()

    panel.compute()
    panel.worker.join()
    assert not stale(panel)
    panel.status.observe(stop_in_the_middle, "value")
    panel.controls["fps"].value = 11
    assert stale(panel), "from the first move on"
    panel.worker.join()
    assert "stopped" in said[-1] and not any("step 2" in s for s in said if "float64" in s)
    assert "not known yet" in panel.number.value and "no noise floor yet" in panel.plot.content["alt"]
    assert not stale(panel) and "fps 11," in panel.caption.value, "all of one case, the one that was asked for"
    assert not nn.modules.module._global_forward_pre_hooks
    stop_at = "diffusers, step 1"
    panel.controls["fps"].value = 13
    panel.worker.join()
    assert stale(panel) and "fps 11," in panel.caption.value, "what is shown is not where the slider stands"
    panel.status.unobserve_all()
    assert panel.back.layout.display == "", "and there is a way back"
    panel.back.click()
    panel.worker.join()
    assert panel.controls["fps"].value == 11 and panel.stop.disabled and not stale(panel)
    assert ", divergence" in panel.number.value, "float64 is made up for"


def test_an_error_is_shown_and_there_is_a_way_back(panel: ExplorerPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    panel.compute()
    panel.worker.join()
    panel.controls["min_guidance_scale"].value = 3.0
    panel.controls["max_guidance_scale"].value = 1.0
    panel.worker.join()
    assert "diffusers fails at a ramp from 3 to 1" in panel.status.value
    assert stale(panel) and panel.back.layout.display == ""
    panel.back.click()
    panel.worker.join()
    assert not stale(panel) and "done" in panel.status.value
    panel.seed.value = -1
    panel.worker.join()
    assert "seed: got -1, allowed" in panel.status.value and "Traceback" not in panel.status.value and stale(panel)
    panel.seed.value = 0
    panel.worker.join()
    monkeypatch.setattr(panel.explorer.lab, "cases", None)
    panel.controls["max_guidance_scale"].value = 2.0
    panel.worker.join()
    assert "TypeError" in panel.status.value and "Traceback" in panel.status.value and stale(panel)


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
    assert [row[0] for row in grid] == ["3", "7", "20"], "the start, too"
    for settings in (explorer.start, *(explorer.start.replace(fps=fps) for fps in (3, 20))):
        case = lab.case(settings, BUG)
        assert ratio_text(case.on) in page and ratio_text(case.off) in page
    assert page.count('<figure class="svdlab-player') == 1 and page.count("<img") == 2 + 3
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


@pytest.fixture
def diagnoser(lab: Lab) -> Diagnoser:
    settings = lab.settings(num_frames=2, num_inference_steps=1, height=32, width=32)
    return Diagnoser(lab.pipe, lab.reference(settings), lab.truth(settings))


def found(panel: Diagnoser) -> str:
    return "".join(child.value for child in panel.found.children if isinstance(child, ipywidgets.HTML))


def test_a_reader_finds_the_bug_in_their_own_file(diagnoser: Diagnoser, lab: Lab, tmp_path: Path) -> None:
    assert "<img" not in diagnoser._repr_mimebundle_()["text/html"], "a page has no kernel"
    diagnoser.target.value = str(tmp_path / "reference.safetensors")
    diagnoser.write.click()
    diagnoser.worker.join()
    assert f"wrote {diagnoser.target.value}" in diagnoser.status.value
    port, bad = tmp_path / "port.safetensors", tmp_path / "bad.safetensors"
    buggy = lab.pipe.with_bugs(BUG)
    capture(buggy, replay=diagnoser.reference, preprocess=True, until="noise_pred.000", path=str(port))
    bad.write_bytes(port.read_bytes()[:1000])
    for name, said in ((str(tmp_path / "none"), "no such file"), (str(bad), "bad.safetensors"), (str(port), "done")):
        diagnoser.source.value = name
        diagnoser.diagnose.click()
        diagnoser.worker.join()
        assert said in diagnoser.status.value and "Traceback" not in diagnoser.status.value
        assert bool(diagnoser.found.children) == (said == "done")
    page = found(diagnoser)
    assert all(
        said in page for said in ("1 choice of the original", "explains all that is wrong", "<img", "of 15 stages")
    )
    links = re.findall("href='([^']*)'", page)
    assert f"<b>{BUG}</b>: no bug" in page
    assert links == ["01_fps_conditioning.ipynb", "10_where_diffusers_departs.ipynb"]
    assert ["time_ids", "wrong"] in [row[:2] for row in rows(page)], "stage by stage"
    assert diagnoser.found.children[-1].view["probe"] == "added_time_ids", "and the tensors themselves"


def uploaded(name: str, content: bytes) -> dict[str, Any]:
    """A file as the browser's side of the widget gives it."""
    about = {"type": "", "size": len(content), "last_modified": datetime.now(timezone.utc)}
    return {"name": name, "content": memoryview(content), **about}


def test_an_upload_and_an_example_are_diagnosed_at_once(diagnoser: Diagnoser) -> None:
    made = diagnoser.reference.save(Path(diagnoser._uploads.name) / "made.safetensors")
    for content, said in ((made.path.read_bytes(), "At parity: nothing is wrong"), (b"PK", "")):
        diagnoser.upload.value = (uploaded("../mine.safetensors", content),)
        diagnoser.worker.join()
        assert "mine.safetensors" in diagnoser.status.value and said in found(diagnoser)
    assert "done" not in diagnoser.status.value and not found(diagnoser), "a bad file leaves no older answer"
    diagnoser.example.value = ("guidance_swapped",)
    diagnoser.worker.join()
    assert "done" in diagnoser.status.value and "1 bug explains all that is wrong" in found(diagnoser)
    assert "href='06_cfg_batching.ipynb'" in found(diagnoser)


def test_a_diagnosis_can_be_stopped(diagnoser: Diagnoser) -> None:
    said: list[str] = []

    def stop_in_the_middle(change: dict[str, str]) -> None:
        said.append(change["new"])
        if "replay 5 " in change["new"]:
            diagnoser.stop.click()

    diagnoser.status.observe(stop_in_the_middle, "value")
    diagnoser.example.value = ("guidance_swapped",)
    diagnoser.worker.join()
    assert "stopped" in said[-1] and not any("replay 7 " in text for text in said) and not diagnoser.found.children


def test_a_writer_can_be_saved_in_every_language(diagnoser: Diagnoser) -> None:
    for language in diagnoser.language.options:
        diagnoser.language.value = language
        name, data = re.findall(r"download='([^']+)' href='data:text/plain;base64,([^']+)'", diagnoser.writer.value)[0]
        assert base64.b64decode(data) == (writers() / name).read_bytes()
    assert len(diagnoser.language.options) == len(list(writers().iterdir()))
