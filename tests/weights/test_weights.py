"""Pretrained weights: names, velocities equal to diffusers', one clear error for what does not fit, and memory."""

import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fw_train.build import build_model, initialise, on_meta
from fw_train.model.wan import VARIANTS, WanDiT
from fw_train.model.world import FantasyWorldModel
from fw_train.weights.files import CheckpointError
from fw_train.weights.wan import (
    DIFFUSERS_BLOCK_NAMES,
    DIFFUSERS_NAMES,
    load_wan,
    map_names,
    seed_geometry,
    to_diffusers,
    to_original,
    widen_input_channels,
)
from samples import make_batch, tiny_params, tiny_wan

FLF = {"image_position": True}


def random_state(wan, dtype=torch.float32, seed=0):
    """Weights without zeros or ones that would hide a mix-up."""
    torch.manual_seed(seed)
    return {name: (0.2 * torch.randn(p.shape)).to(dtype) for name, p in WanDiT(wan).named_parameters()}


def saved(tmp_path, state, name="wan.safetensors", metadata=None):
    save_file(state, tmp_path / name, metadata)
    return tmp_path / name


def meta_wan(wan, dtype=torch.float32):
    return on_meta(lambda: WanDiT(wan), dtype)


def diffusers_model(wan):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(1)
    clip = wan.inputs.clip
    model = WanTransformer3DModel(
        num_attention_heads=wan.heads, attention_head_dim=wan.head_dim, in_channels=wan.inputs.in_channels,
        text_dim=wan.text_dim, freq_dim=wan.freq_dim, ffn_dim=wan.ffn_dim, num_layers=wan.layers,
        image_dim=wan.clip_dim if clip else None, added_kv_proj_dim=wan.dim if clip else None,
        pos_embed_seq_len=514 if wan.image_position else None,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def diffusers_velocity(model, batch):
    hidden = batch.latents if batch.image_latents is None else torch.cat((batch.latents, batch.image_latents), dim=1)
    clip = batch.clip
    if clip is not None and clip.shape[1] == 514:  # diffusers takes the two images of a sample one after the other
        clip = clip.unflatten(1, (2, 257)).flatten(0, 1)
    with torch.no_grad():
        return model(hidden, batch.timestep, batch.text, clip, return_dict=False)[0]


# Names.


@pytest.mark.parametrize("changes", [{"variant": "t2v"}, {"variant": "i2v"}, {"variant": "i2v", **FLF}], ids=str)
def test_names_go_to_diffusers_and_back(changes):
    wan = tiny_wan(layers=2, **changes)
    ours = list(WanDiT(wan).state_dict())
    theirs = [to_diffusers(name) for name in ours]
    assert set(theirs) == set(diffusers_model(wan).state_dict())
    assert [to_original(name) for name in theirs] == ours


def test_every_entry_of_the_name_tables_is_a_name_of_the_network():
    names = list(WanDiT(tiny_wan("i2v", layers=1, **FLF)).state_dict())
    stems = {name.removesuffix(".weight").removesuffix(".bias") for name in names}
    assert stems == {*DIFFUSERS_NAMES, *(f"blocks.0.{name}" for name in DIFFUSERS_BLOCK_NAMES)}


@pytest.mark.parametrize(
    "name", ["control_adapter.conv.weight", "ref_conv.weight", "blocks.0.norm9.weight", "", "a\nb"]
)
def test_names_without_a_counterpart_are_errors(name):
    for rename in (to_diffusers, to_original):
        with pytest.raises(CheckpointError, match="no counterpart"):
            rename(name)


@pytest.mark.parametrize(
    "prefix", ["", "model.", "module.", "model.diffusion_model.", "pipe.dit.", "video.", "module.model."]
)
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_prefix_that_all_names_share_is_stripped(prefix, layout):
    names = list(WanDiT(tiny_wan(layers=1)).state_dict())
    keys = [prefix + (to_diffusers(name) if layout == "diffusers" else name) for name in names]
    found = map_names(keys)
    assert (found.layout, found.prefix) == (layout, prefix)
    assert found.file_keys == dict(zip(names, keys, strict=True))


def test_a_prefix_that_only_some_names_have_stays():
    keys = ["model.patch_embedding.weight", "time_projection.1.bias"]
    assert map_names(keys).file_keys == {key: key for key in keys}
    assert map_names([]).file_keys == {}


def test_the_same_weights_under_two_names_are_an_error():
    with pytest.raises(CheckpointError, match=r"two names: 1 \(blocks\.0\.self_attn\.q\.weight = blocks\.0\.attn1"):
        map_names(["blocks.0.self_attn.q.weight", "blocks.0.attn1.to_q.weight"])


# The same network as diffusers'.


@pytest.mark.parametrize("changes", [{"variant": "t2v"}, {"variant": "i2v"}, {"variant": "i2v", **FLF}], ids=str)
def test_weights_of_diffusers_give_the_velocity_of_diffusers(tmp_path, changes):
    wan = tiny_wan(layers=3, **changes)
    theirs = diffusers_model(wan).eval()
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()
    ours = meta_wan(wan)
    report = load_wan(ours, tmp_path, "cpu")
    assert report.layout == "diffusers"
    # 512 text tokens: diffusers cuts the image tokens off by that number.
    batch = make_batch(wan, size=2, text_tokens=512, clip_tokens=514 if wan.image_position else 257)
    with torch.no_grad():
        velocity = ours(batch)
    reference = diffusers_velocity(theirs, batch)
    assert reference.std() > 0.1
    assert (velocity - reference).abs().max() <= 2e-4 * max(1.0, reference.abs().max())


@pytest.mark.parametrize("changes", [{"variant": "t2v"}, {"variant": "i2v", **FLF}], ids=str)
def test_our_weights_load_strictly_into_diffusers(changes):
    wan = tiny_wan(layers=2, **changes)
    state = random_state(wan)
    theirs = diffusers_model(wan)
    theirs.load_state_dict({to_diffusers(name): tensor for name, tensor in state.items()})
    assert torch.equal(theirs.blocks[1].attn2.to_out[0].weight, state["blocks.1.cross_attn.o.weight"])
    assert torch.equal(theirs.scale_shift_table, state["head.modulation"])


def test_the_norm_that_published_i2v_weights_carry_for_nothing_is_ignored(tmp_path, caplog):
    wan = tiny_wan("i2v", layers=1)
    state = {to_diffusers(name): tensor for name, tensor in random_state(wan).items()}
    state["blocks.0.attn2.norm_added_q.weight"] = torch.ones(wan.dim)
    with caplog.at_level(logging.INFO):
        load_wan(meta_wan(wan), saved(tmp_path, state), "cpu")
    assert "not used by the network: 1 (blocks.0.attn2.norm_added_q.weight)" in caplog.text


# Loading.


@pytest.mark.parametrize(
    "changes",
    [
        *({"variant": variant} for variant in VARIANTS),
        {"variant": "control", "reference_conv": True},
        {"variant": "i2v", **FLF},
    ],
    ids=str,
)
@pytest.mark.parametrize("on", ["meta", "cpu"])
def test_every_tensor_of_every_variant_is_loaded(tmp_path, changes, on):
    wan = tiny_wan(layers=2, **changes)
    state = random_state(wan)
    model = meta_wan(wan) if on == "meta" else WanDiT(wan)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    report = load_wan(model, saved(tmp_path, state), "cpu")
    loaded = dict(model.named_parameters())
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert {name for name, p in loaded.items() if p.requires_grad} == {n for n in state if n.startswith("head.")}
    assert (report.tensors, report.parameters) == (len(state), sum(t.numel() for t in state.values()))
    assert (report.layout, report.widened_from) == ("original", None)


@pytest.mark.parametrize(
    ("of_file", "of_model"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_tensors_take_the_dtype_of_the_parameters(tmp_path, of_file, of_model):
    wan = tiny_wan(layers=1)
    state = random_state(wan, of_file)
    model = meta_wan(wan, of_model)
    load_wan(model, saved(tmp_path, state), "cpu")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == of_model
        assert torch.equal(parameter, state[name].to(of_model))


def test_a_torch_file_of_a_training_program(tmp_path):
    wan = tiny_wan(layers=1)
    state = random_state(wan)
    torch.save(
        {"module": {f"pipe.dit.{name}": tensor for name, tensor in state.items()}, "epoch": 1}, tmp_path / "x.pt"
    )
    model = meta_wan(wan)
    load_wan(model, tmp_path / "x.pt", "cpu")
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())


def test_what_does_not_fit_is_listed_in_one_error_and_nothing_is_loaded(tmp_path):
    wan = tiny_wan(layers=2)
    state = random_state(wan)
    del state["blocks.1.ffn.0.bias"]
    state["blocks.0.extra.weight"] = torch.zeros(1)
    state["head.head.bias"] = torch.zeros(7)
    state["text_embedding.2.bias"] = torch.zeros(wan.dim, dtype=torch.int8)
    model = meta_wan(wan)
    with pytest.raises(CheckpointError) as error:
        load_wan(model, saved(tmp_path, state), "cpu")
    text = str(error.value)
    assert "wan.safetensors does not fit the t2v network: " in text
    assert "missing: 1 (blocks.1.ffn.0.bias)" in text
    assert "unexpected: 1 (blocks.0.extra.weight)" in text
    assert "of another shape: 1 (head.head.bias [7], expected [64])" in text
    assert "not floating-point: 1 (text_embedding.2.bias torch.int8)" in text
    assert "set model." not in text
    assert all(p.is_meta for p in model.parameters())


def test_an_unexpected_name_is_reported_as_the_file_has_it(tmp_path):
    wan = tiny_wan(layers=1)
    state = {f"model.{to_diffusers(name)}": tensor for name, tensor in random_state(wan).items()}
    state["model.blocks.0.attn3.to_q.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"unexpected: 1 \(model\.blocks\.0\.attn3\.to_q\.weight\)"):
        load_wan(meta_wan(wan), saved(tmp_path, state), "cpu")


def test_long_lists_of_names_are_cut(tmp_path):
    state = random_state(tiny_wan(layers=6))
    with pytest.raises(CheckpointError) as error:
        load_wan(meta_wan(tiny_wan(layers=2)), saved(tmp_path, state), "cpu")
    assert len(str(error.value)) < 1000
    assert "unexpected: 108 (" in str(error.value)
    assert "and 100 more" in str(error.value)
    assert "set model.layers=6" in str(error.value)


@pytest.mark.parametrize(
    ("of_file", "of_model", "hint"),
    [
        ("i2v", "t2v", "i2v or inpaint weights (36 input channels, img_emb, no control_adapter)"),
        ("t2v", "camera", "t2v weights (16 input channels, no img_emb, no control_adapter)"),
        ("control", "camera", "control weights (48 input channels, img_emb, no control_adapter)"),
        ("camera", "i2v", "camera weights (32 input channels, img_emb, control_adapter)"),
    ],
)
def test_weights_of_another_variant_name_it(tmp_path, of_file, of_model, hint):
    path = saved(tmp_path, random_state(tiny_wan(of_file, layers=1)))
    with pytest.raises(CheckpointError) as error:
        load_wan(meta_wan(tiny_wan(of_model, layers=1)), path, "cpu")
    assert f"this looks like {hint}; set model.variant={of_file}" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"dim": 72}, "set model.dim=72"),
        ({"layers": 3}, "set model.layers=3"),
        ({"reference_conv": True}, "set model.reference_conv=true"),
        ({"image_position": True}, "set model.image_position=true"),
    ],
)
def test_other_sizes_and_options_name_the_setting(tmp_path, changes, hint):
    wan = tiny_wan("control", layers=1)
    path = saved(tmp_path, random_state(replace(wan, **changes)))
    with pytest.raises(CheckpointError) as error:
        load_wan(meta_wan(wan), path, "cpu")
    assert str(error.value).endswith(hint)
    assert "model.variant" not in str(error.value)


@pytest.mark.parametrize("name", ["ffn_dim", "text_dim", "clip_dim", "freq_dim"])
def test_other_widths_name_the_setting(tmp_path, name):
    wan = tiny_wan("i2v", layers=1)
    path = saved(tmp_path, random_state(replace(wan, **{name: 24})))
    with pytest.raises(CheckpointError, match=f"set model.{name}=24$"):
        load_wan(meta_wan(wan), path, "cpu")


def test_weights_of_no_variant(tmp_path):
    state = random_state(tiny_wan(layers=1))
    state["patch_embedding.weight"] = torch.zeros(48, 36, 1, 2, 2)
    with pytest.raises(CheckpointError, match="no variant has 36 input channels, no img_emb, no control_adapter"):
        load_wan(meta_wan(tiny_wan("i2v", layers=1)), saved(tmp_path, state), "cpu")


@pytest.mark.parametrize(
    "state", [{"conv_in.weight": torch.zeros(1)}, {"patch_embedding.weight": torch.zeros(3)}], ids=list
)
def test_weights_of_something_else(tmp_path, state):
    with pytest.raises(CheckpointError, match="not a Wan transformer"):
        load_wan(meta_wan(tiny_wan(layers=1)), saved(tmp_path, state), "cpu")


# Fewer input channels than configured.


def test_a_narrower_patch_embedding_is_widened_only_where_that_is_allowed(tmp_path, caplog):
    narrow, wide = tiny_wan("i2v", layers=2), tiny_wan("control", layers=2)
    state = random_state(narrow)
    path = saved(tmp_path, state)
    model = meta_wan(wide)
    with pytest.raises(CheckpointError) as error:
        load_wan(model, path, "cpu")
    assert "patch_embedding.weight [48, 36, 1, 2, 2], expected [48, 48, 1, 2, 2]" in str(error.value)
    assert "weights.widen_input=true" in str(error.value)

    report = load_wan(model, path, "cpu", widen=True)
    assert report.widened_from == 36
    assert "widened from 36 to 48 input channels" in caplog.text
    weight = model.patch_embedding.weight
    assert torch.equal(weight[:, :36], state["patch_embedding.weight"])
    assert not weight[:, 36:].any()

    batch = make_batch(wide)
    conditions = torch.cat((batch.control_latents, batch.image_latents), dim=1)
    same = replace(batch, control_latents=None, image_latents=conditions[:, :20])
    original = meta_wan(narrow)
    load_wan(original, path, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(batch), original(same))


def test_widening_does_not_replace_what_else_is_missing(tmp_path):
    path = saved(tmp_path, random_state(tiny_wan("t2v", layers=1)))
    with pytest.raises(CheckpointError) as error:
        load_wan(meta_wan(tiny_wan("camera", layers=1)), path, "cpu", widen=True)
    text = str(error.value)
    assert "img_emb.proj.0.weight" in text
    assert "of another shape" not in text
    assert "set model.variant=t2v" in text


def test_a_wider_patch_embedding_is_never_cut(tmp_path):
    path = saved(tmp_path, random_state(tiny_wan("control", layers=1)))
    with pytest.raises(
        CheckpointError, match=r"patch_embedding.weight \[48, 48, 1, 2, 2\], expected \[48, 36, 1, 2, 2\]"
    ):
        load_wan(meta_wan(tiny_wan("i2v", layers=1)), path, "cpu", widen=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False), nn.Conv3d(4, 6, (1, 2, 2), padding_mode="replicate")],
    ids=["2d", "3d"],
)
def test_a_widened_convolution_keeps_dtype_settings_and_outputs(conv, dtype):
    conv = conv.to(dtype).requires_grad_(False)
    before = conv.weight.clone()
    wide = widen_input_channels(conv, 9)
    assert type(wide) is type(conv)
    assert {p.dtype for p in wide.parameters()} == {dtype}
    assert not any(p.requires_grad for p in wide.parameters())
    assert (wide.in_channels, tuple(wide.weight.shape[:2])) == (9, (6, 9))
    assert (wide.stride, wide.padding, wide.padding_mode) == (conv.stride, conv.padding, conv.padding_mode)
    x = torch.randn(2, 9, *[8] * (conv.weight.ndim - 2)).to(dtype)
    torch.testing.assert_close(wide(x), conv(x[:, :4]))
    with torch.no_grad():
        wide.weight.fill_(1)
    assert torch.equal(conv.weight, before), "no storage is shared"
    assert conv.in_channels == 4


def test_a_convolution_that_cannot_be_widened():
    with pytest.raises(ValueError, match="2 groups"):
        widen_input_channels(nn.Conv2d(4, 4, 1, groups=2), 8)
    with pytest.raises(ValueError, match="has 4 input channels already, more than 3"):
        widen_input_channels(nn.Conv2d(4, 4, 1), 3)


# Geometry blocks.


@pytest.mark.parametrize("on", ["meta", "cpu"])
@pytest.mark.parametrize("variant", ["t2v", "camera"])
def test_geometry_blocks_start_as_copies_of_their_video_blocks(tmp_path, variant, on):
    params = tiny_params(variant)
    state = random_state(params.wan, torch.bfloat16)
    model = on_meta(lambda: FantasyWorldModel(params), torch.bfloat16)
    load_wan(model.video, saved(tmp_path, state), "cpu")
    if on == "cpu":
        initialise(model, "cpu", seed=0)
    model.geo_blocks[0].ffn.requires_grad_(False)
    seed_geometry(model)
    initialise(model, "cpu", seed=0)

    assert len(model.geo_blocks) == 4
    for pair, block in enumerate(model.geo_blocks):
        parameters = dict(block.named_parameters())
        source = f"blocks.{2 + pair}."
        names = [name.removeprefix(source) for name in state if name.startswith(source)]
        assert len(names) == (27 if variant == "t2v" else 32)
        for name in names:
            assert torch.equal(parameters.pop(name), state[source + name]), name
        for name in ("q", "k", "v", "o"):
            for leaf in ("weight", "bias"):
                copied = parameters.pop(f"frame_attn.{name}.{leaf}")
                assert torch.equal(copied, state[f"{source}self_attn.{name}.{leaf}"])
        for name in ("norm_q", "norm_k"):
            assert torch.equal(parameters.pop(f"frame_attn.{name}.weight"), state[f"{source}self_attn.{name}.weight"])
        assert set(parameters) == {"frame_attn.gate", "pose_adapter.1.weight", "pose_adapter.1.bias"}
        assert not any(parameter.any() for parameter in parameters.values())
    assert not model.geo_blocks[0].ffn[0].weight.requires_grad
    assert model.geo_blocks[1].ffn[0].weight.requires_grad


def test_geometry_blocks_share_no_storage_with_the_video_blocks_nor_with_each_other():
    model = build_model(tiny_params(), torch.float32)
    seed_geometry(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.geo_blocks[1].self_attn.parameters():
            parameter += 1
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"geo_blocks.1.self_attn.{n}" for n, _ in model.geo_blocks[1].self_attn.named_parameters()}


def test_seeding_before_loading_is_an_error():
    with pytest.raises(ValueError, match="have no weights yet"):
        seed_geometry(on_meta(lambda: FantasyWorldModel(tiny_params()), torch.float32))


# Memory.

MEASURED = """
import json, sys
import torch
from fw_train.build import on_meta
from fw_train.model.wan import WanDiT, WanParams
from fw_train.weights.wan import load_wan

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

wan = WanParams("t2v", dim=512, ffn_dim=2048, heads=4, layers=12)
model = on_meta(lambda: WanDiT(wan), torch.float32)
torch.zeros(1).bfloat16()
before = status("VmRSS")
load_wan(model, sys.argv[1], "cpu")
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"weights": weights, "peak": status("VmHWM") - before, "after": status("VmRSS") - before}))
"""


def test_loading_holds_one_copy_of_the_weights(tmp_path):
    from fw_train.model.wan import WanParams

    wan = WanParams("t2v", dim=512, ffn_dim=2048, heads=4, layers=12)
    state = {name: torch.zeros(p.shape) for name, p in meta_wan(wan).named_parameters()}
    path = saved(tmp_path, state)
    del state
    run = subprocess.run([sys.executable, "-c", MEASURED, str(path)], capture_output=True, text=True, check=True)
    path.unlink()
    measured = json.loads(run.stdout)
    assert measured["weights"] > 200e6
    assert measured["after"] > 0.9 * measured["weights"], "the weights are in memory, not mapped and unread"
    assert measured["peak"] < 1.15 * measured["weights"]
