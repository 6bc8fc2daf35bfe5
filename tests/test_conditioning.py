from dataclasses import replace

import pytest
import torch

from fw_train.conditioning import complete, sidecar_kinds
from fw_train.model.wan import WanDiT
from samples import make_batch, tiny_wan


def sidecars_alone(wan):
    """A batch as the loader gives it: image latents of 16 channels, nothing that follows from others."""
    batch = make_batch(wan)
    image = torch.randn(1, 16, 2, 4, 6)
    return replace(batch, image_latents=image, control_latents=None, reference_latents=None)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("variant", ["t2v", "i2v", "inpaint", "control", "camera"])
def test_every_variant_runs_on_what_sidecars_hold(variant, reference):
    wan = tiny_wan(variant, reference_conv=reference)
    batch = complete(sidecars_alone(wan), wan)
    assert WanDiT(wan)(batch).shape == (1, 16, 2, 4, 6)


def test_the_mask_says_that_the_first_latent_frame_is_given():
    wan = tiny_wan("i2v")
    before = sidecars_alone(wan)
    image = complete(before, wan).image_latents
    assert image.shape[1] == 20
    assert (image[:, :4, 0] == 1).all()
    assert (image[:, :4, 1:] == 0).all()
    assert torch.equal(image[:, 4:], before.image_latents)


def test_the_reference_is_the_first_frame_and_the_missing_control_video_is_zero():
    wan = tiny_wan("control", reference_conv=True)
    before = sidecars_alone(wan)
    batch = complete(before, wan)
    assert torch.equal(batch.reference_latents, before.image_latents[:, :, 0])
    assert batch.control_latents.shape == before.latents.shape
    assert not batch.control_latents.any()


def test_what_a_variant_does_not_take_is_left_out():
    batch = complete(sidecars_alone(tiny_wan("camera")), tiny_wan("t2v"))
    assert batch.image_latents is batch.reference_latents is batch.control_camera is None


@pytest.mark.parametrize(
    ("variant", "reference", "field", "kind"),
    [("i2v", False, "clip", "clip"), ("i2v", False, "image_latents", "image"), ("t2v", True, "image_latents", "image")],
)
def test_a_missing_sidecar_is_named_with_the_command_that_makes_it(variant, reference, field, kind):
    wan = tiny_wan(variant, reference_conv=reference)
    message = rf"'{variant}' needs the `{kind}` sidecar.*fw data encode DATA .*--members {kind}"
    with pytest.raises(ValueError, match=message):
        complete(replace(sidecars_alone(wan), **{field: None}), wan)


def test_sidecars_that_are_read():
    assert sidecar_kinds(tiny_wan("t2v"), online=False) == ("text", "latent")
    assert sidecar_kinds(tiny_wan("camera"), online=False) == ("text", "clip", "latent", "image")
    assert sidecar_kinds(tiny_wan("camera"), online=True) == ("text", "clip")
    assert sidecar_kinds(tiny_wan("t2v", reference_conv=True), online=False) == ("text", "latent", "image")
