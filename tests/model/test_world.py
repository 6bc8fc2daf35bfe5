"""The whole network: how the branches meet, what trains, and what each stage computes."""

from dataclasses import replace

import pytest
import torch

from fw_train.build import build_model, on_meta, world_params
from fw_train.config import load_config
from fw_train.model import wan as wan_module
from fw_train.model.layers import Fp32Linear
from fw_train.model.world import FantasyWorldModel
from fw_train.precision import assert_uniform, in_island
from fw_train.stages import apply_stage, stage_rules
from samples import make_batch, tiny_params


def build(stage, variant="camera", dtype=torch.float32, opened=False, **changes):
    """A network of the stage; `opened` gives its zero-initialised gates and adapters values, as training would."""
    model = build_model(tiny_params(variant, interaction=stage == "stage2", **changes), dtype)
    apply_stage(model, stage_rules(stage))
    if opened:
        generator = torch.Generator().manual_seed(3)
        for name, p in model.named_parameters():
            if "gate" in name or "gamma" in name or "adapter" in name.replace("control_adapter", ""):
                p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def loss_of(prediction):
    return sum(x.float().square().mean() for x in prediction if x is not None and x.requires_grad)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_shapes_and_dtypes_of_a_prediction(stage):
    model = build(stage)
    batch = make_batch(model.params.wan, frames=9, height=48, width=32, size=2)
    prediction = model(batch)
    assert prediction.velocity.shape == batch.latents.shape
    assert prediction.depth.shape == prediction.confidence.shape == (2, 9, 48, 32)
    assert prediction.points.shape == (2, 9, 3, 48, 32)
    assert prediction.cameras.shape == (2, 9, 9)
    assert {value.dtype for value in prediction} == {torch.float32}


@pytest.mark.parametrize("variant", ["t2v", "i2v", "control", "camera"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_fresh_network_predicts_exactly_the_base_models_velocity(variant, stage):
    model = build(stage, variant, reference_conv=variant == "control")
    batch = make_batch(model.params.wan)
    with torch.no_grad():
        assert torch.equal(model(batch).velocity, model.video(batch))


def test_opened_gates_let_the_geometry_branch_steer_the_video():
    model = build("stage2", opened=True)
    batch = make_batch(model.params.wan)
    with torch.no_grad():
        assert not torch.allclose(model(batch).velocity, model.video(batch))


def test_192_video_tokens_make_a_197_token_geometry_sequence_with_five_unrotated(monkeypatch):
    model = build("stage1", "t2v")
    batch = make_batch(model.params.wan, frames=45, height=64, width=64)  # 12 x 4 x 4 tokens
    queries, keys, projected = [], [], []
    attend = wan_module.attend

    def spy(q, k, v):
        queries.append(q)
        keys.append(k)
        return attend(q, k, v)

    attention = model.geo_blocks[0].self_attn
    for norm in (attention.norm_q, attention.norm_k):
        norm.register_forward_hook(lambda _, args, out: projected.append(out))
    block = model.geo_blocks[0]
    # only the global attention of the first geometry block is watched
    attention.register_forward_pre_hook(lambda *_: monkeypatch.setattr(wan_module, "attend", spy))
    attention.register_forward_hook(lambda *_: monkeypatch.setattr(wan_module, "attend", attend))
    with torch.no_grad():
        model(batch, velocity=False)
    (q,), (k,) = queries, keys
    assert block is model.geo_blocks[0]
    assert q.shape[1] == k.shape[1] == 192 + 5
    for rotated, plain in zip((q, k), projected, strict=True):
        plain = plain.unflatten(2, (model.params.wan.heads, -1))
        assert torch.equal(rotated[:, 192:], plain[:, 192:]), "special tokens must keep their queries and keys"
        assert rotated[:, 192:].abs().min() > 0
        assert not torch.equal(rotated[:, 1:192], plain[:, 1:192])


def test_special_tokens_stand_behind_the_video_tokens_camera_first():
    model = build("stage1", "t2v")
    seen = []
    model.geo_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(make_batch(model.params.wan, size=2), velocity=False)
    special = seen[0][:, -5:]
    assert torch.equal(special[:, :1], model.token_camera.expand(2, -1, -1))
    assert torch.equal(special[:, 1:], model.tokens_register.expand(2, -1, -1))


def test_the_geometry_branch_reads_the_bridge_and_the_bridge_the_last_shared_block():
    model = build("stage1", "t2v")
    last, bridged, entered = [], [], []
    model.video.blocks[1].register_forward_hook(lambda _, args, out: last.append(out))
    model.latent_bridge.register_forward_hook(lambda _, args, out: bridged.append((args[0], out)))
    model.geo_blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        model(make_batch(model.params.wan), velocity=False)
    assert torch.equal(last[0], bridged[0][0])
    assert torch.equal(bridged[0][1], entered[0][:, :-5])


def whole_graph(stage1_model):
    """The same weights with both branches run in full, interacting through their zero gates, autograd everywhere."""
    whole = FantasyWorldModel(replace(stage1_model.params, interaction=True))
    whole.load_state_dict(stage1_model.state_dict())
    apply_stage(whole, stage_rules("stage1"))
    return whole


@pytest.mark.parametrize("variant", ["t2v", "camera"])
def test_stage_1_gradients_are_those_of_the_whole_graph(variant):
    model = build("stage1", variant)
    batch = make_batch(model.params.wan)
    loss_of(model(batch, velocity=False)._replace(velocity=None)).backward()
    whole = whole_graph(model)
    with_autograd = replace(batch, latents=batch.latents.clone().requires_grad_())
    loss_of(whole(with_autograd)._replace(velocity=None)).backward()
    fast, slow = gradients(model), gradients(whole)
    assert fast.keys() == slow.keys()
    assert all(torch.equal(fast[name], slow[name]) for name in fast)


def test_stage_1_runs_the_second_half_only_when_the_velocity_is_asked_for():
    model = build("stage1")
    batch = make_batch(model.params.wan)
    ran = []
    for index, block in enumerate(model.video.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad():
        assert model(batch, velocity=False).velocity is None
    assert ran == [0, 1]
    ran.clear()
    assert not model(batch).velocity.requires_grad
    assert ran == [0, 1, 2, 3, 4, 5]


def test_stage_1_keeps_no_activations_of_the_frozen_prefix():
    model = build("stage1")
    grad_modes = []
    model.video.blocks[0].register_forward_pre_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    model(make_batch(model.params.wan), velocity=False)
    assert grad_modes == [False]


def test_stage_0_runs_the_video_branch_alone_and_trains_all_of_it():
    model = build("stage0")
    prediction = model(make_batch(model.params.wan), geometry=False)
    assert prediction[1:] == (None, None, None, None)
    loss_of(prediction).backward()
    assert gradients(model).keys() == {name for name, _ in model.named_parameters() if name.startswith("video.")}


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_frozen_weights_get_no_gradient_and_never_change(stage):
    model = build(stage)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=1e-2)
    for seed in range(2):
        loss_of(model(make_batch(model.params.wan, seed=seed))).backward()
        assert not any(name.startswith("video.") for name in gradients(model))
        optimiser.step()
        optimiser.zero_grad()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_stage_2_reaches_the_camera_adapters_through_frozen_blocks():
    model = build("stage2", opened=True)
    batch = make_batch(model.params.wan)
    model(batch).velocity.square().mean().backward()
    reached = gradients(model)
    assert all(reached[f"camera_adapters.{i}.1.weight"].abs().sum() > 0 for i in range(2))
    assert all(reached[f"irg_cross_attns.{i}.gamma_m1"].abs().sum() > 0 for i in range(4))
    assert not any(name.startswith("video.") for name in reached)


def test_every_trainable_parameter_of_stage_2_has_a_gradient():
    model = build("stage2", opened=True)
    loss_of(model(make_batch(model.params.wan))).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())]
    # The last cross-attention's video side is followed by the head alone, its geometry side by the dense heads: all reached.
    assert without == []


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_dropped_camera_closes_every_path(stage):
    """Nothing that the camera said before it was dropped changes anything the network returns."""
    model = build(stage, opened=True)
    batch = make_batch(model.params.wan, size=2)
    other = replace(batch, pose9=batch.pose9 + 1, control_camera=batch.control_camera + 1)
    dropped = torch.tensor([True, False])
    with torch.no_grad():
        a, b = model(batch.drop_camera(dropped)), model(other.drop_camera(dropped))
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert torch.equal(x[0], y[0]), f"{name} of the dropped sample still depends on its camera"
        assert not torch.equal(x[1], y[1]), f"{name} of the kept sample does not see its camera"


def test_without_a_pose_the_network_behaves_as_with_a_dropped_one():
    model = build("stage2", "t2v", opened=True)
    batch = make_batch(model.params.wan)
    with torch.no_grad():
        dropped = model(batch.drop_camera(torch.tensor([True])))
        without = model(replace(batch, pose9=None))
    assert all(torch.equal(a, b) for a, b in zip(dropped, without, strict=True))


def test_poses_of_another_length_are_an_error():
    model = build("stage1", "t2v")
    batch = make_batch(model.params.wan, frames=5)
    with pytest.raises(ValueError, match="pose9 has 9 frames, the latents stand for 5"):
        model(replace(batch, pose9=torch.zeros(1, 9, 9)))


def test_a_camera_of_the_first_latent_frame_alone_shifts_only_its_tokens():
    model = build("stage2", "t2v", opened=True)
    batch = make_batch(model.params.wan, frames=9)
    moved = batch.pose9.clone()
    moved[:, 0] += 1
    entered = []
    model.video.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        model(batch)
        model(replace(batch, pose9=moved))
    changed = (entered[0] - entered[1]).abs().amax(dim=(0, 2)).unflatten(0, (3, -1)).amax(dim=1)
    assert changed[0] > 0
    assert changed[1:].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ("stage1", [(41, 288, 512), (81, 336, 592)]),
        ("stage2", [(81, 592, 336), (41, 512, 288)]),
        ("stage1_14b", [(81, 336, 592)]),
        ("stage2_14b", [(41, 592, 336)]),
    ],
)
def test_the_real_sizes_have_the_right_shapes(config, sizes):
    """1.3B and 14B, both orientations, 41 and 81 frames, on the meta device."""
    params = world_params(load_config(f"configs/{config}.yaml"))
    model = on_meta(lambda: FantasyWorldModel(params), torch.bfloat16)
    for frames, height, width in sizes:
        batch = make_batch(params.wan, frames, height, width, text_tokens=512, dtype=torch.bfloat16, device="meta")
        with torch.no_grad():
            prediction = model(batch)
        assert prediction.velocity.shape == (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
        assert prediction.depth.shape == prediction.confidence.shape == (1, frames, height, width)
        assert prediction.points.shape == (1, frames, 3, height, width)
        assert prediction.cameras.shape == (1, frames, 9)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_bf16_network_computes_in_bf16_outside_its_islands(stage):
    model = build(stage, dtype=torch.bfloat16)
    assert_uniform(model, torch.bfloat16)
    seen = {}

    def record(name):
        def hook(module, args):
            seen[name] = args[0].dtype, module.weight.dtype

        return hook

    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose2d)
    expected = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    for name in expected:
        model.get_submodule(name).register_forward_pre_hook(record(name))
    prediction = model(make_batch(model.params.wan, dtype=torch.bfloat16))
    loss_of(prediction).backward()
    if stage == "stage1":
        expected = {n for n in expected if not n.startswith(("camera_adapters", "irg_cross_attns"))}
    assert seen.keys() == expected
    assert {name: d for name, d in seen.items() if d != (torch.bfloat16, torch.bfloat16) and not in_island(name)} == {}
    islands = {name for name in seen if isinstance(model.get_submodule(name), Fp32Linear)}
    assert islands == {name for name in seen if in_island(name)}
    assert all(seen[name][1] == torch.bfloat16 for name in islands)


def test_the_network_runs_in_half_precision():
    model = build("stage2", dtype=torch.float16)
    with torch.no_grad():
        prediction = model(make_batch(model.params.wan, dtype=torch.float16))
    assert all(value.isfinite().all() for value in prediction)


def test_shard_units_hold_every_heavy_parameter_once():
    model = build("stage2")
    units = model.shard_units()
    assert [unit.name for unit in units] == list(dict.fromkeys(unit.name for unit in units))
    assert all(model.get_submodule(unit.name) is unit.module for unit in units)
    held = [id(p) for unit in units for p in unit.module.parameters()]
    assert len(held) == len(set(held))
    root = {name.split(".")[0] for name, p in model.named_parameters() if id(p) not in set(held)}
    assert root == {"video", "token_camera", "tokens_register", "pose_enc", "head_camera", "camera_adapters"}


def test_the_dense_heads_read_the_taps_finest_first():
    model = build("stage1", "t2v")
    made, read = {}, []
    for index, block in enumerate(model.geo_blocks):
        block.register_forward_hook(lambda _, args, out, index=index: made.update({index: out}))
    model.head_depth.register_forward_pre_hook(lambda _, args: read.extend(args[0]))
    with torch.no_grad():
        model(make_batch(model.params.wan), velocity=False)
    assert len(read) == 4
    for tap, block in zip(read, (3, 2, 1, 0), strict=True):
        assert torch.equal(tap, made[block][:, :-5])


def test_a_nan_in_a_dropped_camera_stays_out():
    model = build("stage2", "t2v", opened=True)
    batch = make_batch(model.params.wan, size=2)
    broken = replace(batch, pose9=batch.pose9.clone())
    broken.pose9[0] = torch.nan
    with torch.no_grad():
        prediction = model(broken.drop_camera(torch.tensor([True, False])))
    assert all(value.isfinite().all() for value in prediction)


def test_stage_2_runs_no_head_that_is_not_asked_for():
    model = build("stage2", "t2v", opened=True)
    batch = make_batch(model.params.wan)
    with torch.no_grad():
        both, alone = model(batch), model(batch, geometry=False)
        assert alone[1:] == (None, None, None, None)
        assert torch.equal(alone.velocity, both.velocity)
        assert model(batch, velocity=False).velocity is None
    with pytest.raises(ValueError, match="neither velocity nor geometry"):
        model(batch, velocity=False, geometry=False)


@pytest.mark.parametrize("field", ["text", "timestep", "clip", "image_latents", "control_camera", "pose9", "camera_on"])
def test_an_input_of_another_batch_size_is_an_error_and_not_stretched(field):
    model = build("stage1", "camera")
    batch = make_batch(model.params.wan, size=2).drop_camera(torch.tensor([False, False]))
    with pytest.raises(ValueError, match=f"`{field}` has 1 samples, the latents have 2"):
        model(replace(batch, **{field: getattr(batch, field)[:1]}))


def test_camera_maps_of_another_size_are_an_error_and_not_stretched():
    model = build("stage1", "camera")
    batch = make_batch(model.params.wan)
    for maps in (batch.control_camera[:, :, :1], batch.control_camera[..., :16, :16]):
        with pytest.raises(ValueError, match=r"the latents need \(2, 32, 48\)"):
            model(replace(batch, control_camera=maps))


def test_tables_and_modulation_reach_every_block_in_fp32():
    model = build("stage2", "t2v", dtype=torch.bfloat16)
    seen = []
    for block in [*model.video.blocks, *model.geo_blocks]:
        block.register_forward_pre_hook(lambda _, args: seen.append({args[3].dtype, args[4].dtype}))
    batch = make_batch(model.params.wan, dtype=torch.bfloat16)
    with torch.no_grad():
        model(batch)
    assert seen == [{torch.float32}] * 10
    stream = model.video.embed(batch)
    for cast in ({"rope": stream.rope.bfloat16()}, {"modulation": stream.modulation.bfloat16()}):
        with pytest.raises(TypeError, match="must be float32"):
            model.video.run_block(0, stream._replace(**cast))
