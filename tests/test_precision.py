"""The dtype table, and the check of built models; it serves foreign models too."""

import pytest
import torch
from torch import nn

from fw_train.precision import PRECISIONS, PrecisionError, assert_uniform
from fw_train.weights.wan import widen_input_channels


def test_the_table():
    bf16, fp16 = PRECISIONS["bf16"], PRECISIONS["fp16"]
    assert (bf16.params, bf16.compute, bf16.master, bf16.gradients) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    assert (fp16.params, fp16.loss_scaling, bf16.loss_scaling) == (torch.float16, True, False)
    assert {p.vae for p in PRECISIONS.values()} == {torch.float32}


def test_every_stray_parameter_and_buffer_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to(torch.bfloat16)
    assert_uniform(model, torch.bfloat16)  # the integer counter of the batch norm does not count
    model[0].bias.data = model[0].bias.data.float()
    model[1].running_var = model[1].running_var.float()
    with pytest.raises(
        PrecisionError, match=r"2 tensors are not torch.bfloat16: 0\.bias \(torch.float32\), 1\.running_var"
    ):
        assert_uniform(model, torch.bfloat16)


def test_a_layer_added_after_the_cast_is_found():
    """The bug behind `mat1 and mat2 must have the same dtype`: a module built in the default dtype."""
    model = nn.Sequential(nn.Linear(2, 2)).to(torch.bfloat16)
    model.append(nn.Linear(2, 2))
    with pytest.raises(PrecisionError, match=r"1\.weight \(torch.float32\), 1\.bias"):
        assert_uniform(model, torch.bfloat16)


def test_reassigning_a_cast_parameter_raises_so_nothing_here_does_it():
    module = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="cannot assign"):
        module.weight = module.weight.to(torch.bfloat16)


def test_a_foreign_half_precision_unet_with_an_fp32_vae():
    """encode -> cast -> UNet with a widened input -> fp32 loss -> backward, without a dtype error."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4,
    ).to(torch.float16)  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=16)
    old = unet.conv_in.weight.detach().clone()
    unet.conv_in = widen_input_channels(unet.conv_in, 9)
    assert torch.equal(unet.conv_in.weight[:, :4], old)
    assert not unet.conv_in.weight[:, 4:].any()
    assert_uniform(unet, torch.float16)
    assert_uniform(vae, PRECISIONS["fp16"].vae)

    half = PRECISIONS["fp16"].compute
    image = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        latent = vae.encode(image).latent_dist.mean.to(half)
    assert latent.isfinite().all()
    conditions = torch.randn(1, 5, *latent.shape[2:]).to(half)
    out = unet(torch.cat((latent, conditions), dim=1), torch.tensor([500]), torch.randn(1, 3, 8).to(half)).sample
    assert out.dtype == half
    loss = (out.float() - latent.float()).square().mean()
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is None or p.grad.dtype == half for p in unet.parameters())
    assert unet.conv_in.weight.grad[:, 4:].any(), "the new channels learn"
