"""Memory by formula and by a step without storage, against fake tensors, a real step, and what the real engines own."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
import torch.distributed as c10d
from forked_ranks import alone, run_ranks
from tiny_training import make_data, write_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from fw_train.activation_checkpointing import MODES, apply_activation_checkpointing
from fw_train.batch import Batch
from fw_train.build import build_model, on_meta, world_params
from fw_train.checkpoint.fragments import Piece, coverage_problems
from fw_train.commands.bench_feed import labelled_batch
from fw_train.config import load_config
from fw_train.data.manifest import Dataset
from fw_train.engine import make_engine
from fw_train.losses import compute_losses
from fw_train.model.world import FantasyWorldModel
from fw_train.plan.data import data_plan
from fw_train.plan.estimate import counts, largest_size, make_plan, model_flops, planned_parameters, remedies
from fw_train.plan.memory import LiveBytes, StepMemory, gpu_kernels, measure_step, meta_batch
from fw_train.plan.shards import engine_memory, owned
from fw_train.precision import PRECISIONS
from fw_train.run.params import engine_params, step_params
from fw_train.stages import apply_stage, stage_rules
from fw_train.step import train_step
from fw_train.weights.wan import assign_parameter


def demo(*overrides):
    return load_config("configs/demo.yaml", overrides)


@pytest.fixture
def tiny(tmp_path):
    def config(*overrides):
        return load_config(write_config(tmp_path / "tiny.yaml", "data", tmp_path / "out"), overrides)

    return config


def real_engine(config, place):
    """What the real engine of one rank owns, and the bytes of its state, where nobody answers and nothing travels."""
    c10d.init_process_group("fake", store=FakeStore(), rank=place.rank, world_size=place.size)
    model = build_model(world_params(config), PRECISIONS[config.train.precision].params)
    groups = apply_stage(model, stage_rules(config.train.stage, config.train.gate_lr_scale))
    engine = make_engine(model, groups, engine_params(config, 1), place)
    pieces = [[f.name, list(f.shape), f.start, f.numel] for f in engine.fragments()]
    return [pieces, engine.state_bytes().optimiser]


@pytest.mark.parametrize(("engine", "world"), [("engine.zero_stage=2", 2), ("engine.kind=fsdp2", 4)])
def test_each_rank_owns_what_the_real_engine_gives_it(engine, world, tiny, monkeypatch):
    config = tiny("train.precision=bf16", engine)
    parameters = planned_parameters(config)
    monkeypatch.setattr("forked_ranks.TIMEOUT_S", 120)  # every rank imports its engine
    everything = []
    for rank, (found, optimiser_bytes) in enumerate(run_ranks(world, lambda place: real_engine(config, place))):
        pieces = owned(config, parameters.groups, rank, world)
        everything += pieces
        assert sorted(pieces) == sorted(Piece(name, tuple(shape), *run) for name, shape, *run in found), rank
        assert optimiser_bytes <= engine_memory(config, parameters, world, 1).optimiser
    assert coverage_problems(everything) == []
    assert sum(piece.numel for piece in everything) == parameters.trainable
    largest = max(sum(p.numel for p in owned(config, parameters.groups, rank, world)) for rank in range(world))
    assert 12 * largest == pytest.approx(engine_memory(config, parameters, world, 1).optimiser, rel=0.01)


def fake_peak(config, mode):
    """Peak of the same step, draws left out, on fake CPU tensors; PyTorch's MemTracker cannot follow parts without autograd."""
    model = on_meta(lambda: FantasyWorldModel(world_params(config)), PRECISIONS[config.train.precision].params)
    stage, dtype = config.train.stage, PRECISIONS[config.train.precision].compute
    meta = meta_batch(config, config.train.micro_batch, largest_size(config))

    def step(batch, losses):
        dropped = torch.zeros(len(batch.latents), dtype=torch.bool)
        empty_text = torch.empty(batch.text.shape[1:])
        noisy = batch.noised(batch.latents + batch.latents, torch.zeros(len(batch.latents)))
        noisy = noisy.drop_camera(dropped).drop_text(dropped, empty_text).to("cpu", dtype)
        trains_velocity = stage != "stage1"
        prediction = model(noisy, velocity=trains_velocity)
        target = batch.latents - batch.latents if trains_velocity else None
        return compute_losses(prediction, batch, target, losses, diffusion_in_total=trains_velocity).total

    with FakeTensorMode(), gpu_kernels():
        for name, parameter in list(model.named_parameters()):
            assign_parameter(model, name, torch.empty(parameter.shape, dtype=parameter.dtype))
        apply_stage(model, stage_rules(stage))
        apply_activation_checkpointing(model.shard_units(), mode)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with LiveBytes(model, "cpu") as live:
            fields = {name: getattr(meta, name) for name in meta.__dataclass_fields__}
            made = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in fields.items() if isinstance(t, torch.Tensor)}
            batches = [Batch(**{**made, "position": None})]
            del made
            step(batches.pop(), step_params(config).losses).backward()
    return live.peak


@pytest.mark.parametrize(("stage", "mode"), [("stage1", "full"), ("stage2", "selective")])
def test_the_peak_of_a_step_is_that_of_fake_tensors(stage, mode):
    """With the preset that selects nothing from the data, which fake tensors do not have."""
    config = demo(f"train.stage={stage}", *(["weights.init_from=x"] if stage == "stage2" else []), "loss.preset=paper")
    assert measure_step(config, mode, largest_size(config)).peak == pytest.approx(fake_peak(config, mode), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_peak_at_full_size_is_that_of_fake_tensors(mode, stage):
    config = load_config(f"configs/{stage}.yaml", ["loss.preset=paper"])
    assert measure_step(config, mode, largest_size(config)).peak == pytest.approx(fake_peak(config, mode), rel=0.15)


def allocator_peak(work):
    """The most bytes that PyTorch's allocator has out at once, by its own reports to the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    reports = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(reports, key=lambda event: event.start_ns())))


def counted_and_measured(config):
    """Peaks of a real step on the CPU, by the counter and by the allocator."""
    model = build_model(world_params(config), torch.float32)
    apply_stage(model, stage_rules(config.train.stage))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = labelled_batch(config, alone())
    empty_text = torch.zeros_like(batch.text[0])

    def step():
        train_step(model, batch, step_params(config), empty_text).total.backward()

    with LiveBytes(model, "cpu") as live:
        step()
    return [live.peak, allocator_peak(step)]


@pytest.mark.parametrize(
    "words",
    [
        ["train.stage=stage0", "data.sizes_px=[[160,256]]"],
        pytest.param(["data.sizes_px=[[96,128]]"], marks=pytest.mark.slow),
    ],
)
def test_counted_bytes_are_those_that_a_real_step_takes(words):
    words = ["train.precision=fp32", "data.frames=33", "train.micro_batch=1", "train.global_batch=1", *words]
    (result,) = run_ranks(1, lambda _: counted_and_measured(demo(*words)))
    counted, measured = result
    assert counted == pytest.approx(measured, rel=0.1)  # the allocator also sees what an operation needs while it runs


def test_the_step_leaves_nothing_behind_and_modes_rank(tiny):
    config = tiny()
    full, selective, none = (measure_step(config, mode, (32, 48)) for mode in ("full", "selective", "none"))
    assert full.blocks < selective.blocks < none.blocks
    assert full.executed_flops > selective.executed_flops > none.executed_flops
    doubled = replace(config, train=replace(config.train, micro_batch=2))
    video_alone = replace(config, train=replace(config.train, stage="stage0"))
    assert measure_step(video_alone, "full", (32, 48)).heads == 0
    twice = measure_step(doubled, "none", (32, 48))
    assert twice.blocks == pytest.approx(2 * none.blocks, rel=0.05)


def test_a_plan_adds_up(tiny):
    config = tiny("train.global_batch=8")
    plan = make_plan(config, 4, "h20", mfu=0.5)
    flops = 8 * model_flops(config)
    assert plan.speed.step_s == pytest.approx(flops / (4 * 148e12 * 0.5))
    assert plan.speed.hours == pytest.approx(8 * plan.speed.step_s / 3600)
    assert plan.speed.accumulate == 2
    engine, step = plan.memory
    parts = [engine.weights, engine.optimiser, engine.gradients, engine.buckets]
    assert plan.memory.total == sum(parts) + step.inputs + step.blocks + step.heads + step.working
    assert plan.disk.save_bytes == pytest.approx(plan.trainable * (12 + 4), rel=0.01)  # fp32
    assert plan.disk.saves == 3  # of 8 steps, every 3
    assert {row.gpus for row in plan.what_if} == {4, 8}


def test_what_does_not_fit_says_what_would():
    config = load_config("configs/stage1.yaml", ["train.activation_checkpointing=none"])
    step = StepMemory(0, 0, 0, 0, 1.0)
    measured = {"none": step._replace(blocks=60 * 10**9), "selective": step._replace(blocks=30 * 10**9), "full": step}
    parameters = planned_parameters(config)
    assert remedies(config, 64, 45e9, measured, parameters) == ["train.activation_checkpointing=selective"]
    assert remedies(config, 64, 25e9, measured, parameters) == ["train.activation_checkpointing=full"]


def test_numbers_of_gpus_to_compare_are_those_that_the_global_batch_allows():
    assert counts(load_config("configs/stage1.yaml"), 4) == [4, 8, 16, 32, 64]
    assert counts(load_config("configs/stage2.yaml"), 112) == [8, 16, 56, 112]


def test_a_world_that_does_not_divide_the_batch_lists_those_that_do():
    with pytest.raises(ValueError, match=r"use one of \[1, 2, 4, 8, 16, 32, 64\] GPUs"):
        make_plan(load_config("configs/stage1.yaml"), 96, "h20")


def test_data_that_are_there_count_by_their_manifest(tmp_path):
    data = make_data(tmp_path, clips=3)
    config = load_config(write_config(tmp_path / "tiny.yaml", data, tmp_path / "out"))
    found = data_plan(config)
    dataset = Dataset(data)
    labels = sum(dataset.sample(row).members[suffix].size for row in range(3) for suffix in ("depth.geo", "points.geo"))
    assert found.samples == 3
    assert found.label_bytes == pytest.approx(labels / 3)
    assert found.sidecar_bytes > 0
    assert found.video_bytes == 0
