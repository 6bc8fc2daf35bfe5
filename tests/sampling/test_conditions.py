"""The batch that a clip is made from: every input of every variant, and closed paths where there is no camera."""

import math

import pytest
import torch

from fw_train.encoders.dct import DctCodec
from fw_train.sampling.conditions import Shape, conditions
from fw_train.sampling.trajectories import camera_inputs, generated_trajectory, square_pixels
from samples import tiny_wan

SHAPE = Shape(5, 32, 48)
PATH = generated_trajectory(
    "orbit", 0.4, 5, 1.0, square_pixels(torch.tensor(math.radians(45), dtype=torch.float64), SHAPE.size_px)
)
IMAGE = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
TEXT = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))


class Encoders:
    """Stands for those of a Wan folder: the image's features are its mean."""

    def image(self):
        return self

    def encode(self, image):
        return image.mean().expand(1, 5, 40)


def made(variant, image=IMAGE, path=PATH, **changes):
    return conditions(tiny_wan(variant, **changes), SHAPE, TEXT, image, path, DctCodec(), Encoders())


@pytest.mark.parametrize(("variant", "mask"), [("i2v", 4), ("inpaint", 4), ("control", 0), ("camera", 0)])
def test_the_first_frame_is_encoded_for_the_variants_that_start_from_one(variant, mask):
    batch = made(variant, reference_conv=variant == "camera")
    video = torch.zeros(1, 3, 5, 32, 48)
    video[:, :, 0] = IMAGE
    latents = DctCodec().encode(video)
    assert torch.equal(batch.image_latents[:, mask:], latents)
    assert not mask or batch.image_latents[:, :mask].flatten(2).sum(-1).tolist() == [[4.0 * 6] * 4]
    assert torch.equal(batch.clip, IMAGE.mean().expand(1, 5, 40))
    if variant == "camera":
        assert torch.equal(batch.reference_latents, latents[:, :, 0])


def test_the_camera_goes_to_the_poses_and_to_the_rays_of_control_camera():
    inputs = camera_inputs(PATH, SHAPE.size_px)
    for variant in ("t2v", "camera"):
        batch = made(variant, image=IMAGE if variant == "camera" else None)
        assert torch.equal(batch.pose9, inputs.pose9)
        assert torch.equal(batch.text, TEXT[None])
        if variant == "camera":
            assert torch.equal(batch.control_camera, inputs.control_camera)
        else:
            assert batch.control_camera is None


def test_without_a_path_all_that_the_camera_could_say_is_closed():
    batch = made("camera", path=None)
    assert batch.pose9 is None
    assert batch.control_camera.shape == (1, 24, 2, 32, 48)
    assert not batch.control_camera.any()
