"""From a clean batch to losses: noise, dropouts, what each stage trains on."""

from dataclasses import replace

import pytest
import torch

from fw_train.build import build_model
from fw_train.flow import shifted
from fw_train.losses import LossParams
from fw_train.stages import apply_stage, stage_rules
from fw_train.step import StepParams, noised_batch, train_step
from samples import make_batch, tiny_params

PARAMS = StepParams(stage="stage1", dtype=torch.float32)
EMPTY = torch.full((7, 32), 5.0)


def labelled(wan, size=2, frames=5, height=32, width=48, positions=(11, 12)):
    generator = torch.Generator().manual_seed(0)
    batch = make_batch(wan, frames, height, width, size)
    return replace(
        batch,
        timestep=None,
        depth=1 + torch.rand(size, frames, height, width, generator=generator),
        points=torch.randn(size, frames, 3, height, width, generator=generator),
        valid=torch.ones(size, frames, height, width, dtype=torch.bool),
        position=torch.tensor(positions),
    )


def build(stage):
    model = build_model(tiny_params("camera", interaction=stage == "stage2"), torch.float32)
    apply_stage(model, stage_rules(stage))
    return model


@pytest.mark.parametrize(
    ("stage", "log_diffusion", "names"),
    [
        ("stage0", False, {"diffusion", "total"}),
        ("stage1", False, {"depth_loss", "point_loss", "camera_loss", "total"}),
        ("stage1", True, {"diffusion", "depth_loss", "point_loss", "camera_loss", "total"}),
        ("stage2", False, {"diffusion", "depth_loss", "point_loss", "camera_loss", "total"}),
    ],
)
def test_the_terms_of_each_stage(stage, log_diffusion, names):
    model = build(stage)
    batch = labelled(model.params.wan)
    losses = train_step(model, batch, replace(PARAMS, stage=stage), EMPTY, log_diffusion=log_diffusion)
    named = losses.named()
    assert named.keys() == {f"loss/{name}" for name in names}
    parts = [named[f"loss/{n}"] for n in names - {"total"} if not (stage == "stage1" and n == "diffusion")]
    torch.testing.assert_close(named["loss/total"], torch.stack(parts).sum())
    losses.total.backward()
    assert all((p.grad is not None) <= p.requires_grad for p in model.parameters())


def test_logging_the_diffusion_loss_changes_no_gradient_in_stage_1():
    gradients = []
    for log_diffusion in (False, True):
        model = build("stage1")
        train_step(model, labelled(model.params.wan), PARAMS, EMPTY, log_diffusion=log_diffusion).total.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def test_the_input_of_a_sample_depends_on_its_position_alone():
    wan = tiny_params("camera").wan
    batch = labelled(wan)
    both, target = noised_batch(batch, PARAMS, EMPTY)
    fields = ("latents", "text", "clip", "image_latents", "control_camera", "pose9", "position")
    alone = replace(batch, **{name: getattr(batch, name)[1:] for name in fields})
    second, second_target = noised_batch(alone, PARAMS, EMPTY)
    assert torch.equal(both.latents[1:], second.latents)
    assert torch.equal(both.timestep[1:], second.timestep)
    assert torch.equal(target[1:], second_target)
    moved, _ = noised_batch(replace(batch, position=torch.tensor([11, 13])), PARAMS, EMPTY)
    assert torch.equal(both.latents[0], moved.latents[0])
    assert not torch.equal(both.latents[1], moved.latents[1])


def test_seed_and_shift_are_those_of_the_settings():
    batch = labelled(tiny_params("camera").wan)
    usual, _ = noised_batch(batch, replace(PARAMS, shift=5.0), EMPTY)
    uniform, _ = noised_batch(batch, replace(PARAMS, shift=1.0), EMPTY)
    torch.testing.assert_close(usual.timestep, 1000 * shifted(uniform.timestep / 1000, 5.0))
    reseeded, _ = noised_batch(batch, replace(PARAMS, seed=1), EMPTY)
    assert (reseeded.timestep != usual.timestep).all()


def test_the_losses_are_weighted_as_the_settings_say():
    model = build("stage1")
    weighted = replace(PARAMS, losses=LossParams(point_weight=0.0, camera_weight=0.0))
    named = train_step(model, labelled(model.params.wan), weighted, EMPTY).named()
    assert named["loss/total"] == named["loss/depth_loss"]


def test_the_noisy_latents_and_the_target_agree():
    batch = labelled(tiny_params("camera").wan)
    noisy, velocity = noised_batch(batch, PARAMS, EMPTY)
    s = (noisy.timestep / 1000).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(noisy.latents - s * velocity, batch.latents, atol=1e-5, rtol=1e-5)


def test_cameras_and_texts_are_dropped_as_often_as_configured_and_independently():
    batch = labelled(tiny_params("t2v").wan, size=1, frames=1, height=16, width=16, positions=(0,))
    camera, text = [], []
    for position in range(1500):
        noisy, _ = noised_batch(replace(batch, position=torch.tensor([position])), PARAMS, EMPTY)
        camera.append(not noisy.camera_on.item())
        text.append(torch.equal(noisy.text[0], EMPTY))
    assert sum(camera) / 1500 == pytest.approx(0.17, abs=0.03)
    assert sum(text) / 1500 == pytest.approx(0.1, abs=0.03)
    assert sum(c and t for c, t in zip(camera, text, strict=True)) / 1500 == pytest.approx(0.017, abs=0.012)


def test_a_dropped_camera_stays_the_target():
    """The branch must predict the camera that it was not told."""
    batch = labelled(tiny_params("camera").wan)
    noisy, _ = noised_batch(batch, replace(PARAMS, camera_drop=1.0), EMPTY)
    assert not noisy.camera_on.any()
    assert not noisy.control_camera.any()
    assert torch.equal(noisy.pose9, batch.pose9)


def test_the_timestep_stays_fp32_in_a_bf16_run():
    noisy, velocity = noised_batch(labelled(tiny_params("camera").wan), replace(PARAMS, dtype=torch.bfloat16), EMPTY)
    assert noisy.latents.dtype == noisy.text.dtype == noisy.control_camera.dtype == torch.bfloat16
    assert noisy.timestep.dtype == noisy.pose9.dtype == velocity.dtype == torch.float32


def test_a_batch_without_positions_is_an_error():
    batch = replace(labelled(tiny_params("camera").wan), position=None)
    with pytest.raises(ValueError, match="no positions"):
        noised_batch(batch, PARAMS, EMPTY)
