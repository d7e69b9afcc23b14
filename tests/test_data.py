"""The procedural clips: what they promise of motion, and that what is held out is held out."""

from __future__ import annotations

import numpy as np
import pytest

from svdlab.errors import SvdlabError
from svdlab.training.data import (
    DIRECTIONS,
    HELD_OUT,
    SHAPES,
    SIZE,
    Scene,
    displacement,
    sample_image,
    sample_scene,
    speed,
)


def test_motion_falls_with_the_frame_rate_and_rises_with_the_bucket() -> None:
    assert displacement(7, 127) == pytest.approx(2.8)
    assert displacement(7, 127) / displacement(28, 127) == pytest.approx(4)
    speeds = [speed(bucket) for bucket in range(1, 256)]
    assert speeds == sorted(speeds) and len(set(speeds)) == len(speeds)


@pytest.mark.parametrize("index", range(24))
def test_the_shape_moves_where_its_nose_points_and_stays_inside(index: int) -> None:
    scene = sample_scene(index)
    clip = scene.clip(8, 7, 127)
    assert clip.shape == (8, SIZE, SIZE, 3) and clip.min() >= 0 and clip.max() <= 1
    moved = np.diff(scene.track(clip), axis=0)
    np.testing.assert_allclose(moved, np.tile(np.multiply(DIRECTIONS[scene.direction], 2.8), (7, 1)), atol=0.2)
    edge = np.abs(clip - scene.backdrop()).max(-1)
    assert max(edge[:, 0].max(), edge[:, -1].max(), edge[:, :, 0].max(), edge[:, :, -1].max()) < 1e-9


def test_the_nose_tells_the_direction() -> None:
    for index in range(24):
        scene = sample_scene(index)
        body, nose = scene.coverage(np.array([scene.start]))
        y, x = np.mgrid[:SIZE, :SIZE] + 0.5
        ahead = [(nose[0] * axis).sum() / nose.sum() - (body[0] * axis).sum() / body.sum() for axis in (x, y)]
        directions = list(DIRECTIONS)
        assert directions[int(np.argmax(np.array(list(DIRECTIONS.values())) @ ahead))] == scene.direction


def test_scenes_are_varied_and_repeatable() -> None:
    scenes = [sample_scene(i) for i in range(60)]
    assert {s.shape for s in scenes} == set(SHAPES) and {s.direction for s in scenes} == set(DIRECTIONS)
    assert {s.background[0] == s.background[1] for s in scenes} == {True, False}
    assert sample_scene(3) == Scene.from_seed(HELD_OUT + 3) != sample_scene(4)


def test_a_large_first_frame_is_the_small_one_with_more_pixels() -> None:
    small, large = np.array(sample_scene(3).image(), float), np.array(sample_image(3), float)
    assert large.shape == (8 * SIZE, 8 * SIZE, 3)
    np.testing.assert_allclose(large.reshape(SIZE, 8, SIZE, 8, 3).mean((1, 3)), small, atol=40)
    assert np.abs(large.reshape(SIZE, 8, SIZE, 8, 3).mean((1, 3)) - small).mean() < 1


def test_tracking_refuses_another_size() -> None:
    with pytest.raises(SvdlabError, match=r"frames: got \(2, 32, 32, 3\)"):
        sample_scene().track(np.zeros((2, 32, 32, 3)))
