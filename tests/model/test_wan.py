from dataclasses import replace

import pytest
import torch

from fw_train.model.wan import VARIANTS, WanDiT, sinusoidal
from samples import make_batch, tiny_wan


@pytest.mark.parametrize(
    ("variant", "channels"), [("t2v", 16), ("i2v", 36), ("inpaint", 36), ("control", 48), ("camera", 32)]
)
def test_the_input_channels_of_each_variant(variant, channels):
    assert WanDiT(tiny_wan(variant)).patch_embedding.in_channels == channels


@pytest.mark.parametrize("reference_conv", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_a_velocity_of_the_latents_shape(variant, reference_conv):
    wan = tiny_wan(variant, layers=2, reference_conv=reference_conv)
    batch = make_batch(wan, size=2)
    with torch.no_grad():
        velocity = WanDiT(wan)(batch)
    assert velocity.shape == batch.latents.shape
    assert velocity.dtype == torch.float32


@pytest.mark.parametrize(
    ("variant", "field"),
    [
        ("i2v", "image_latents"),
        ("i2v", "clip"),
        ("inpaint", "image_latents"),
        ("control", "control_latents"),
        ("camera", "control_camera"),
        ("camera", "image_latents"),
        ("t2v", "timestep"),
    ],
)
def test_a_missing_input_is_an_error_that_names_it_and_the_variant(variant, field):
    wan = tiny_wan(variant, layers=1)
    batch = replace(make_batch(wan), **{field: None})
    with pytest.raises(ValueError, match=f"'{variant}' needs `{field}`"):
        WanDiT(wan)(batch)


def test_a_missing_reference_image_is_an_error():
    wan = tiny_wan("control", layers=1, reference_conv=True)
    with pytest.raises(ValueError, match="reference_latents"):
        WanDiT(wan)(replace(make_batch(wan), reference_latents=None))


def test_image_latents_with_a_mask_are_refused_where_the_variant_takes_none():
    batch = make_batch(tiny_wan("i2v"))
    with_control = replace(make_batch(tiny_wan("camera")), image_latents=batch.image_latents)
    with pytest.raises(ValueError, match="16 channels of `image_latents`, got 20"):
        WanDiT(tiny_wan("camera", layers=1))(with_control)


@pytest.mark.parametrize(
    ("variant", "field"),
    [("camera", "control_camera"), ("camera", "image_latents"), ("camera", "clip"), ("control", "control_latents")],
)
def test_every_condition_changes_the_velocity(variant, field):
    wan = tiny_wan(variant, layers=2)
    model, batch = WanDiT(wan), make_batch(wan)
    with torch.no_grad():
        base = model(batch)
        changed = model(replace(batch, **{field: getattr(batch, field) + 1}))
    assert not torch.allclose(base, changed)


def test_the_reference_image_is_attended_and_not_returned():
    wan = tiny_wan("control", layers=2, reference_conv=True)
    model, batch = WanDiT(wan), make_batch(wan)
    with torch.no_grad():
        base = model(batch)
        changed = model(replace(batch, reference_latents=batch.reference_latents + 1))
    assert base.shape == batch.latents.shape
    assert not torch.allclose(base, changed)


@pytest.mark.parametrize("size", [(40, 48), (48, 40)])
def test_latents_that_do_not_fit_the_patches_are_an_error(size):
    wan = tiny_wan("t2v", layers=1)
    with pytest.raises(ValueError, match="divisible by 16"):
        WanDiT(wan)(make_batch(wan, height=size[0], width=size[1]))


def test_two_clip_images_are_told_apart_by_the_position_embedding():
    wan = tiny_wan("i2v", layers=1, image_position=True)
    model = WanDiT(wan)
    torch.nn.init.normal_(model.img_emb.emb_pos)
    batch = make_batch(wan, clip_tokens=514)
    swapped = replace(batch, clip=batch.clip.roll(257, dims=1))
    with torch.no_grad():
        assert not torch.allclose(model(batch), model(swapped))


def test_timesteps_must_be_fp32():
    """bf16 holds only 294 of 1000 timesteps, so they may not even be handed over in it."""
    with pytest.raises(TypeError, match="float32"):
        sinusoidal(torch.tensor([500.0], dtype=torch.bfloat16), 32)


def test_neighbouring_timesteps_stay_apart_in_a_bf16_network():
    wan = tiny_wan("t2v", layers=1)
    model = WanDiT(wan).to(torch.bfloat16)
    batch = make_batch(wan, dtype=torch.bfloat16)
    with torch.no_grad():
        times = [model.embed(replace(batch, timestep=torch.tensor([t]))).modulation for t in (900.0, 900.5)]
    assert times[0].dtype == torch.float32
    assert not torch.equal(times[0], times[1])


def test_samples_of_a_batch_do_not_see_each_other():
    wan = tiny_wan("camera", layers=2)
    model, batch = WanDiT(wan), make_batch(wan, size=2)
    first = {
        f: getattr(batch, f)[:1] for f in ("latents", "text", "timestep", "clip", "image_latents", "control_camera")
    }
    with torch.no_grad():
        torch.testing.assert_close(model(batch)[:1], model(replace(batch, **first)), atol=1e-5, rtol=1e-5)
