"""One engine measured: the parts of a step, its collectives, memory, and a save. Every rank calls everything."""

import ctypes
import gc
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from fw_train import dist
from fw_train.activation_checkpointing import apply_activation_checkpointing
from fw_train.build import build_model, world_params
from fw_train.checkpoint.run_state import RunState, capture_rng
from fw_train.checkpoint.saver import CheckpointSaver, StageWeights
from fw_train.code_version import code_version
from fw_train.commands.bench_feed import Feed
from fw_train.config import Config, config_hash, to_tree
from fw_train.data.order import accumulation_steps
from fw_train.dist import World
from fw_train.engine import Engine, StateBytes, make_engine
from fw_train.measure import peak_bytes, synchronise
from fw_train.monitoring.step_clock import StepClock
from fw_train.precision import PRECISIONS
from fw_train.run.params import engine_params, save_params, step_params
from fw_train.stages import apply_stage, stage_rules
from fw_train.step import train_step
from fw_train.weights.stage import StageInfo

PARTS = ("data", "expand", "forward", "backward", "optimiser")
OPTIMISER_BYTES, GRADIENT_BYTES = 12, 4  # of a trained parameter in fp32: master and two moments; its gradient


class Collectives(NamedTuple):
    """Seconds of one step in which ranks exchanged something, waiting for each other included; on a GPU beside other work."""

    reduce_s: float  # gradients, norms and losses
    gather_s: float  # parameters


class SaveFigures(NamedTuple):
    first_stall_s: float  # memory for the copies is taken
    stall_s: float  # of the second save: all that the loop stands still for
    beside_s: float  # a step while the second one is written
    seconds: float  # from the end of the stall until it is committed
    written: int  # bytes, of all ranks


class EngineUnderTest:
    """A fresh model in an engine."""

    def __init__(self, config: Config, world: World, feed: Feed) -> None:
        self.config, self.world, self.feed = config, world, feed
        self.accumulate = accumulation_steps(config.train.global_batch, world.size, config.train.micro_batch)
        precision = PRECISIONS[config.train.precision]
        model = build_model(world_params(config), precision.params, world.device, config.train.seed)
        groups = apply_stage(model, stage_rules(config.train.stage, config.train.gate_lr_scale))
        apply_activation_checkpointing(model.shard_units(), config.train.activation_checkpointing)
        self.trainable = sum(p.numel() for group in groups for p in group.parameters.values())
        self.checkpoint_ideal = self.trainable * (precision.params.itemsize + OPTIMISER_BYTES)
        self.engine: Engine = make_engine(model, groups, engine_params(config, self.accumulate), world)
        self.engine.set_learning_rate(config.train.learning_rate)
        self._params = step_params(config)

    def step(self) -> dict[str, float]:
        """Seconds of the parts of a step, as the trainer takes it without its figures and guards."""
        clock = StepClock(self.world.device)
        self._backward(clock)
        self._apply()
        clock.mark("optimiser")
        return {**clock.parts_s(), "step": clock.total_s()}

    def look_closer(self) -> tuple[StateBytes, Collectives]:
        """One more step, slower: what the state takes while gradients exist, and when ranks talked."""
        on_gpu = self.world.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as profiler:
            self._backward(StepClock(self.world.device))
            state = self.engine.state_bytes()
            self._apply()
            synchronise(self.world.device)
        reduce: list[tuple[float, float]] = []
        gather: list[tuple[float, float]] = []
        for event in profiler.events() or ():
            if re.match("gloo:|ncclDevKernel", event.name):
                place = event.time_range.start, event.time_range.end
                (gather if re.search("gather|broadcast", event.name, re.IGNORECASE) else reduce).append(place)
        return state, Collectives(covered(reduce) / 1e6, covered(gather) / 1e6)

    def save(self, folder: Path) -> SaveFigures:
        """Two checkpoints one after the other, as the trainer writes them, into an empty folder that all ranks see."""
        saver = CheckpointSaver(folder, self.world, save_params(self.config))
        stalls, beside, written = [], [], []
        for number in (1, 2):
            synchronise(self.world.device)
            began = time.perf_counter()
            weights = self.engine.trainable_weights()
            stage_weights = StageWeights(weights, self._info(number)) if self.world.rank == 0 else None
            saver.save(number, self.engine.fragments(), self._state(number), stage_weights)
            stalls.append(time.perf_counter() - began)
            beside.append(self.step()["step"])
            ended = saver.wait()
            if ended is None or ended.path is None:
                raise OSError(f"the checkpoint could not be written: {ended.error if ended else 'it was put off'}")
            written.append(ended)
        saver.close()
        return SaveFigures(stalls[0], stalls[1], beside[1], written[1].seconds, written[1].bytes_written)

    def _backward(self, clock: StepClock) -> None:
        feed = self.feed
        for _ in range(self.accumulate):
            coded = next(feed.coded)
            clock.mark("data")
            batch = feed.expand(coded)
            clock.mark("expand")
            losses = train_step(self.engine.module, batch, self._params, feed.empty_text)
            clock.mark("forward")
            self.engine.backward(losses.total)
            clock.mark("backward")

    def _apply(self) -> None:
        stats = self.engine.step()
        if not stats.applied:
            raise ValueError(
                f"the gradient's norm is {stats.grad_norm}, and skipped steps are no measure; lower train.learning_rate"
            )

    def _info(self, step: int) -> StageInfo:
        train = self.config.train
        return StageInfo(train.stage, step, config_hash(self.config), "", PRECISIONS[train.precision].params)

    def _state(self, step: int) -> RunState:
        return RunState(
            step=step,
            segments=((0, self.config.train.global_batch),),
            optimiser_steps=self.engine.optimiser_steps(),
            config=to_tree(self.config),
            base_hash="",
            data_fingerprint="",
            scaler_state=self.engine.scaler_state(),
            code_version=code_version(),
            world_size=self.world.size,
            rng=capture_rng(),
        )


class Turn(NamedTuple):
    """What one life of an engine gave."""

    steps: list[dict[str, float]]  # seconds by part
    memory: int | None  # the most that network, engine and steps took of this rank's device, or of the host
    state: StateBytes  # of the rank with the most
    collectives: Collectives
    save: SaveFigures
    trainable: int  # parameters
    checkpoint_ideal: int  # bytes


def one_turn(config: Config, world: World, feed: Feed, folder: Path, steps: int, warmup: int) -> Turn:
    """A fresh model and engine, `warmup` steps, the timed ones, one looked at more closely, two saves into `folder`."""
    free_memory(world.device)
    made: list[EngineUnderTest] = []
    times: list[dict[str, float]] = []

    def work() -> None:
        made.append(EngineUnderTest(config, world, feed))
        times.extend([made[0].step() for _ in range(warmup + steps)][warmup:])

    memory = peak_bytes(work, world.device)
    test = made[0]
    state, collectives = test.look_closer()
    return Turn(times, memory, _highest(state), collectives, test.save(folder), test.trainable, test.checkpoint_ideal)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def free_memory(device: torch.device) -> None:
    """What an earlier engine has left goes back to the system: the next one's peak counts from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _highest(state: StateBytes) -> StateBytes:
    """Of all ranks; the optimiser's and the gradients' apart."""
    most = dist.all_max(torch.tensor([state.optimiser, state.gradients]))
    return StateBytes(*(int(size) for size in most))
