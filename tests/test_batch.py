from dataclasses import replace

import pytest
import torch

from fw_train.batch import latent_frames, pixel_frames
from samples import make_batch, tiny_wan


def test_latent_and_pixel_frames():
    assert [latent_frames(t) for t in (1, 5, 41, 81)] == [1, 2, 11, 21]
    assert [pixel_frames(f) for f in (1, 2, 11, 21)] == [1, 5, 41, 81]


@pytest.mark.parametrize(("frames", "near"), [(0, 1), (4, 5), (80, 81), (82, 81)])
def test_frames_that_are_not_4k_plus_1_are_an_error(frames, near):
    with pytest.raises(ValueError, match=rf"{frames} frames are not 4k \+ 1.*use {near}"):
        latent_frames(frames)


def test_dropping_twice_adds_up():
    batch = make_batch(tiny_wan("camera"), size=3)
    dropped = batch.drop_camera(torch.tensor([True, False, False])).drop_camera(torch.tensor([False, True, False]))
    assert dropped.camera_on.tolist() == [False, False, True]
    assert [bool(maps.any()) for maps in dropped.control_camera] == [False, False, True]


def test_a_dropped_text_becomes_the_empty_prompt():
    batch = make_batch(tiny_wan(), size=2)
    empty = torch.full((7, 32), 3.0, dtype=torch.float64)
    dropped = batch.drop_text(torch.tensor([True, False]), empty)
    assert dropped.text[0].unique().tolist() == [3.0]
    assert torch.equal(dropped.text[1], batch.text[1])
    assert dropped.text.dtype == batch.text.dtype


def test_moving_casts_inputs_and_leaves_labels_and_poses():
    batch = replace(
        make_batch(tiny_wan("camera")), depth=torch.ones(1), valid=torch.ones(1, dtype=torch.bool), keys=("a",)
    )
    moved = batch.to("cpu", torch.bfloat16)
    inputs = {
        moved.latents.dtype,
        moved.text.dtype,
        moved.clip.dtype,
        moved.image_latents.dtype,
        moved.control_camera.dtype,
    }
    assert inputs == {torch.bfloat16}
    assert {moved.timestep.dtype, moved.pose9.dtype, moved.depth.dtype} == {torch.float32}
    assert moved.valid.dtype == torch.bool
    assert moved.keys == ("a",)


def test_an_empty_prompt_of_another_length_is_an_error_and_not_stretched():
    batch = make_batch(tiny_wan(), size=2)
    with pytest.raises(ValueError, match=r"the empty prompt is \(1, 32\), the texts are \(7, 32\)"):
        batch.drop_text(torch.tensor([True, False]), torch.zeros(1, 32))
