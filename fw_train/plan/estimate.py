"""What a run will need: memory of a GPU, time, disk and network, before any machine is asked for.

    plan = make_plan(config, gpus=64, name="h20", mfu=0.4)

Memory is the engine's state by formula (`shards.py`) and a step's by taking it without storage (`memory.py`).
Time is model FLOPs over the device's peak times the model FLOPs utilisation (MFU), which is a guess until it was measured.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from fw_train.activation_checkpointing import MODES, Mode
from fw_train.build import world_params
from fw_train.config import Config
from fw_train.data.order import accumulation_steps
from fw_train.devices import Device, device
from fw_train.flops import Shape, sample_flops, total_flops
from fw_train.plan.data import DataPlan, data_plan
from fw_train.plan.memory import StepMemory, measure_step, meta_network
from fw_train.plan.shards import EngineMemory, Parameters, engine_memory, parameters_of, traffic_bytes
from fw_train.precision import PRECISIONS

NODE_GPUS = 8
SPARE = 0.05  # of a GPU's memory: CUDA's and NCCL's own, cuBLAS's workspaces, fragmentation
DEFAULT_MFU = 0.4
CHECKPOINT_OVERHEAD = 1.005  # docs/benchmarks.md: names and hashes
WHAT_IF_GPUS = (8, 16, 32, 48, 56, 64, 96, 112, 128, 256)


class Speed(NamedTuple):
    accumulate: int
    model_flops: float  # of a step, over all GPUs
    executed_flops: float  # recomputation included
    step_s: float
    hours: float
    gpu_hours: float
    traffic_bytes: int  # that one GPU sends in a step


class Memory(NamedTuple):
    engine: EngineMemory
    step: StepMemory

    @property
    def total(self) -> int:
        return self.engine.total + self.step.peak


class Disk(NamedTuple):
    save_bytes: float  # a checkpoint with its step-N.safetensors
    weights_bytes: float  # of step-N.safetensors alone
    saves: int  # in the run
    kept_bytes: float  # at the end of the run, by run.keep_last and run.keep_every_steps
    month_bytes: float  # written in 30 days at this pace


class WhatIf(NamedTuple):
    gpus: int
    mode: Mode
    memory_bytes: int
    fits: bool
    speed: Speed


class Plan(NamedTuple):
    gpus: int
    device: str
    mfu: float
    mfu_source: str
    trainable: int
    frozen: int
    memory: Memory
    usable_bytes: float
    fits: bool
    remedies: tuple[str, ...]  # settings that fit, where it does not
    speed: Speed
    disk: Disk
    data: DataPlan
    read_bytes_per_s_per_node: float
    label_bytes_per_s_per_node: float
    what_if: tuple[WhatIf, ...]


def make_plan(
    config: Config,
    gpus: int,
    name: str,
    mfu: float = DEFAULT_MFU,
    mfu_source: str = "assumed",
) -> Plan:
    """The plan of a run on `gpus` devices, with what other numbers of them and other checkpointing would give."""
    accumulation_steps(config.train.global_batch, gpus, config.train.micro_batch)
    mode, chosen = config.train.activation_checkpointing, device(name)
    measured = {m: measure_step(config, m, largest_size(config)) for m in MODES}
    parameters = planned_parameters(config)
    speed = speed_of(config, gpus, chosen, mfu, measured, mode, parameters)
    memory = memory_of(config, gpus, measured[mode], parameters)
    usable = usable_bytes(chosen)
    data = data_plan(config)
    samples_per_s_per_node = config.train.global_batch / speed.step_s / gpus * min(gpus, NODE_GPUS)
    table = [
        what_if(config, count, m, chosen, mfu, measured, parameters) for count in counts(config, gpus) for m in measured
    ]
    return Plan(
        gpus=gpus,
        device=name.lower(),
        mfu=mfu,
        mfu_source=mfu_source,
        trainable=parameters.trainable,
        frozen=sum(map(math.prod, parameters.frozen.values())),
        memory=memory,
        usable_bytes=usable,
        fits=memory.total <= usable,
        remedies=() if memory.total <= usable else tuple(remedies(config, gpus, usable, measured, parameters)),
        speed=speed,
        disk=disk_of(config, parameters, speed.step_s),
        data=data,
        read_bytes_per_s_per_node=data.sample_bytes * samples_per_s_per_node,
        label_bytes_per_s_per_node=data.label_bytes * samples_per_s_per_node,
        what_if=tuple(table),
    )


def largest_size(config: Config) -> tuple[int, int]:
    """The size with the most pixels, which decides what fits."""
    return max(config.data.sizes_px, key=lambda size: size[0] * size[1])


def usable_bytes(chosen: Device) -> float:
    return (1 - SPARE) * chosen.memory_gb * 1e9


def planned_parameters(config: Config) -> Parameters:
    model, groups = meta_network(config)
    return parameters_of(model, groups, config.train.precision)


def memory_of(config: Config, gpus: int, step: StepMemory, parameters: Parameters) -> Memory:
    accumulate = accumulation_steps(config.train.global_batch, gpus, config.train.micro_batch)
    return Memory(engine_memory(config, parameters, gpus, accumulate), step)


def model_flops(config: Config) -> float:
    """Of one sample, forward and backward without recomputation, averaged over the sizes."""
    stage, params = config.train.stage, world_params(config)
    shapes = [
        Shape(config.data.frames, height, width, config.data.text_tokens) for height, width in config.data.sizes_px
    ]
    # Stage 1 computes a velocity on the few steps that log the diffusion loss.
    share = 1 / config.train.diffusion_every_steps if stage == "stage1" else 1.0
    with_velocity, without = (
        sum(total_flops(sample_flops(params, shape, stage, velocity)) for shape in shapes) / len(shapes)
        for velocity in (True, False)
    )
    return share * with_velocity + (1 - share) * without


def speed_of(
    config: Config,
    gpus: int,
    chosen: Device,
    mfu: float,
    measured: Mapping[Mode, StepMemory],
    mode: Mode,
    parameters: Parameters,
) -> Speed:
    """At the MFU of the configured checkpointing mode; another mode keeps the rate at which FLOPs are executed."""
    train = config.train
    accumulate = accumulation_steps(train.global_batch, gpus, train.micro_batch)
    flops = train.global_batch * model_flops(config)
    work = measured[mode].executed_flops / measured[train.activation_checkpointing].executed_flops
    step_s = work * flops / (gpus * chosen.bf16_tflops * 1e12 * mfu)
    hours = train.steps * step_s / 3600
    executed = measured[mode].executed_flops * train.global_batch / train.micro_batch
    traffic = traffic_bytes(config, parameters, gpus, accumulate)
    return Speed(accumulate, flops, executed, step_s, hours, gpus * hours, traffic)


def disk_of(config: Config, parameters: Parameters, step_s: float) -> Disk:
    """A save holds masters, moments and the weights in the network's dtype."""
    run, steps, item = config.run, config.train.steps, parameters.itemsize
    weights = item * parameters.trainable
    size = CHECKPOINT_OVERHEAD * (
        PRECISIONS[config.train.precision].master.itemsize * 3 * parameters.trainable + weights
    )
    every_s = run.save_every_steps * step_s
    if run.save_every_minutes:
        every_s = min(every_s, 60 * run.save_every_minutes)
    saves = max(1, round(steps * step_s / every_s))
    saved_steps = range(run.save_every_steps, steps + 1, run.save_every_steps)
    kept = {
        *saved_steps[-run.keep_last :],
        *(s for s in saved_steps if run.keep_every_steps and s % run.keep_every_steps == 0),
    }
    return Disk(size, weights, saves, size * max(1, len(kept)), size * 30 * 86_400 / every_s)


def counts(config: Config, gpus: int) -> list[int]:
    """Numbers of GPUs worth comparing: whole nodes that the global batch allows, and the one asked for."""
    micro_batches = config.train.global_batch // config.train.micro_batch
    return sorted({gpus, *(count for count in WHAT_IF_GPUS if micro_batches % count == 0)})


def what_if(
    config: Config,
    gpus: int,
    mode: Mode,
    chosen: Device,
    mfu: float,
    measured: Mapping[Mode, StepMemory],
    parameters: Parameters,
) -> WhatIf:
    total = memory_of(config, gpus, measured[mode], parameters).total
    speed = speed_of(config, gpus, chosen, mfu, measured, mode, parameters)
    return WhatIf(gpus, mode, total, total <= usable_bytes(chosen), speed)


def remedies(
    config: Config, gpus: int, usable: float, measured: Mapping[Mode, StepMemory], parameters: Parameters
) -> list[str]:
    """Changes after which the run fits, the one that costs least first; none may help."""
    found = []
    mode = config.train.activation_checkpointing
    for other in MODES[MODES.index(mode) + 1 :]:
        step = measured.get(other) or measure_step(config, other, largest_size(config))
        if memory_of(config, gpus, step, parameters).total <= usable:
            found.append(f"train.activation_checkpointing={other}")
            break
    lightest: Mode = MODES[-1]
    engine = config.engine
    sharded = {
        "engine.kind=fsdp2": replace(engine, kind="fsdp2"),
        "engine.zero_stage=3": replace(engine, kind="deepspeed", zero_stage=3),
    }
    for text, changed in sharded.items():
        if memory_of(replace(config, engine=changed), gpus, measured[mode], parameters).total <= usable:
            found.append(text)
    if config.train.micro_batch > 1:
        one = replace(config, train=replace(config.train, micro_batch=1, activation_checkpointing=lightest))
        if memory_of(one, gpus, measure_step(one, lightest, largest_size(one)), parameters).total <= usable:
            found.append("train.micro_batch=1 with train.activation_checkpointing=full")
    if not found:
        small = replace(config, data=replace(config.data, frames=41, sizes_px=((288, 512),)))
        if memory_of(small, gpus, measure_step(small, lightest, (288, 512)), parameters).total <= usable:
            found.append("data.frames=41 'data.sizes_px=[[288,512]]' with train.activation_checkpointing=full")
    return found
