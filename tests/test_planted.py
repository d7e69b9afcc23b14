"""The plants: each shows exactly from its first probe on, and leaves diffusers as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planted import PLANTS, UNKNOWN, planted

from svdlab.parity.bugs import BUGS
from svdlab.parity.reference import capture_diffusers, load_diffusers
from svdlab.parity.trace import Trace
from svdlab.svd.settings import GenerationSettings

SETTINGS = GenerationSettings(height=32, width=32, num_frames=4, num_inference_steps=3, seed=5)


@pytest.fixture(scope="module")
def pipe(tiny: Path) -> Any:
    return load_diffusers(tiny)


@pytest.fixture(scope="module")
def clean(pipe: Any, photo: Any) -> Trace:
    return capture_diffusers(pipe, photo, SETTINGS)


def test_every_bug_of_the_catalogue_is_planted() -> None:
    assert {name.split(":")[0] for name in PLANTS} == set(BUGS)
    for name, plant in PLANTS.items():
        assert plant.first_probe == BUGS[name.split(":")[0]].first_probe


@pytest.mark.parametrize("name", [*PLANTS, *UNKNOWN])
def test_a_plant_shows_from_its_first_probe_on(pipe: Any, clean: Trace, name: str) -> None:
    with planted(pipe, name):
        candidate = capture_diffusers(pipe, replay=clean, preprocess=True)
    different = [probe for probe in clean.probes if not torch.equal(clean[probe], candidate[probe])]
    assert different[0] == (PLANTS | UNKNOWN)[name].first_probe
    assert different[-1] == "frames"


def test_nothing_is_left_behind(pipe: Any, clean: Trace) -> None:
    with pytest.raises(KeyError), planted(pipe, *(n for n in PLANTS if n != "guidance_per_step"), "no such bug"):
        pass
    again = capture_diffusers(pipe, replay=clean, preprocess=True)
    assert all(torch.equal(clean[probe], again[probe]) for probe in clean)
