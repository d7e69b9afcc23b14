"""The procedural clips: what they promise of motion, and that what is held out is held out."""

from __future__ import annotations

import numpy as np
import pytest

from svdlab.errors import SvdlabError
from svdlab.training.data import (
    BACKDROPS,
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


@pytest.mark.parametrize("bucket", [127, 255])
@pytest.mark.parametrize("index", range(24))
def test_the_shape_moves_where_its_nose_points_and_stays_inside(index: int, bucket: int) -> None:
    scene = sample_scene(index)
    clip = scene.clip(8, 7, bucket)
    assert clip.shape == (8, SIZE, SIZE, 3) and clip.min() >= 0 and clip.max() <= 1
    moved = np.polyfit(range(8), scene.track(clip), 1)[0]
    np.testing.assert_allclose(moved, np.multiply(DIRECTIONS[scene.direction], displacement(7, bucket)), atol=0.25)
    body = scene.coverage(scene.path(8, 7, bucket))[0]
    edges = np.concatenate([body[:, 0], body[:, -1], body[:, :, 0], body[:, :, -1]])
    assert edges.max() < 0.3, "no more than a corner touches the edge"


def test_what_the_backdrop_does_to_tracks_averages_out() -> None:
    """A tone that is near the backdrop's weighs less there, which moves a centroid."""
    for fps, bucket in ((7, 127), (7, 255), (14, 127), (7, 20)):
        errors = []
        for scene in map(sample_scene, range(32)):
            moved = np.polyfit(range(8), scene.track(scene.clip(8, fps, bucket)), 1)[0]
            errors.append(moved @ DIRECTIONS[scene.direction] / displacement(fps, bucket) - 1)
        assert abs(np.mean(errors)) < 0.005


def test_the_nose_tells_the_direction() -> None:
    for index in range(40):
        scene = sample_scene(index)
        body, nose = scene.coverage(np.array([scene.start]))
        y, x = np.mgrid[:SIZE, :SIZE] + 0.5
        ahead = [(nose[0] * axis).sum() / nose.sum() - (body[0] * axis).sum() / body.sum() for axis in (x, y)]
        directions = list(DIRECTIONS)
        assert directions[int(np.argmax(np.array(list(DIRECTIONS.values())) @ ahead))] == scene.direction


def test_scenes_are_varied_and_repeatable() -> None:
    for first in (0, HELD_OUT):
        scenes = [Scene.from_seed(first + i) for i in range(80)]
        assert {s.shape for s in scenes} == set(SHAPES) and {s.direction for s in scenes} == set(DIRECTIONS)
        assert {s.backdrop_kind for s in scenes} == set(BACKDROPS)
        assert {s.stone is None for s in scenes} == {True, False}
    assert sample_scene(3) == Scene.from_seed(HELD_OUT + 3) != sample_scene(4)


def test_held_out_scenes_differ_in_kind() -> None:
    trained, held_out = (
        {(s.shape, s.backdrop_kind) for s in (Scene.from_seed(first + i) for i in range(200))}
        for first in (0, HELD_OUT)
    )
    assert not trained & held_out
    assert len(trained) + len(held_out) == len(SHAPES) * len(BACKDROPS)


def test_a_shape_that_fades_is_paler_and_no_smaller() -> None:
    for scene in map(sample_scene, range(12)):
        clip, faded = scene.clip(8, 7, 127), scene.clip(8, 7, 127, fade=0.25)
        np.testing.assert_array_equal(faded[0], clip[0])
        np.testing.assert_allclose(faded[-1] - scene.backdrop(), 0.75 * (clip[-1] - scene.backdrop()), atol=1e-12)
        np.testing.assert_allclose(scene.seen(faded).sum((1, 2)), scene.seen(clip).sum((1, 2)), rtol=0.15)


def test_a_large_first_frame_is_the_small_one_with_more_pixels() -> None:
    small, large = np.array(sample_scene(3).image(), float), np.array(sample_image(3), float)
    assert large.shape == (8 * SIZE, 8 * SIZE, 3)
    np.testing.assert_allclose(large.reshape(SIZE, 8, SIZE, 8, 3).mean((1, 3)), small, atol=40)
    assert np.abs(large.reshape(SIZE, 8, SIZE, 8, 3).mean((1, 3)) - small).mean() < 1


def test_tracking_refuses_another_size() -> None:
    with pytest.raises(SvdlabError, match=r"frames: got \(2, 32, 32, 3\)"):
        sample_scene().track(np.zeros((2, 32, 32, 3)))
