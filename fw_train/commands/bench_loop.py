"""What the training loop costs over a bare loop around the same engine, on one batch that lies in memory.

The trainer itself runs, with its watch, lease, guards, figures and monitor. What it reads is a stand-in that, between two
steps of the trainer, takes steps of its own with the trainer's engine: both loops work on the same parameters and the same
memory, in turn, within seconds of each other.
"""

import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from fw_train import dist
from fw_train import train as job
from fw_train.batch import Batch
from fw_train.build import build_model, world_params
from fw_train.config import Config
from fw_train.data.order import accumulation_steps
from fw_train.dist import World
from fw_train.engine import Engine, make_engine
from fw_train.measure import synchronise
from fw_train.model.world import FantasyWorldModel
from fw_train.precision import PRECISIONS
from fw_train.run.folder import RunFolder
from fw_train.run.params import step_params
from fw_train.step import StepParams, train_step
from fw_train.watch.stop import StopRequest
from fw_train.watch.watcher import Watch

PATIENCE_S = 3600.0  # for the watch: the bare steps give no sign of life


class Cost(NamedTuple):
    """Of one step."""

    wall_s: float
    cpu_s: float  # of all threads of this process; a busy machine hardly changes it
    engine_s: float  # of the wall, what `train_step`, `backward` and `step` took of the main thread


class Ratio(NamedTuple):
    """Trainer over bare loop."""

    median: float  # of the turns
    quartiles: tuple[float, float]
    total: float  # of all steps together, whatever happens only on some of them included


class LoopFigures(NamedTuple):
    bare: Cost  # median over the turns of their mean step
    trainer: Cost
    wall: Ratio
    cpu: Ratio
    own_s: float  # of a step of the trainer, the median time outside of `train_step`, `backward` and `step`
    turns: int
    steps: int  # counted, of each loop


class InMemory(NamedTuple):
    """What the loop reads of a micro-batch from the loader."""

    keys: tuple[str, ...]
    substituted: tuple[()] = ()


class GivenBatch(NamedTuple):
    """Stands where the trainer makes batches of the data's."""

    batch: Batch
    codec: None = None

    def __call__(self, coded: Any) -> Batch:
        return self.batch


class Alternation:
    """Stands where the trainer's data would; the first step of every turn is not counted, it cleans up after the other's."""

    fingerprint, facts, encodings = "one batch in memory", dict[str, Any](), dict[str, Any]()

    def __init__(
        self, batch: Batch, empty_text: Tensor, params: StepParams, accumulate: int, turns: int, steps: int
    ) -> None:
        self.empty_text = empty_text
        self._batch, self._params, self._accumulate = batch, params, accumulate
        self._turns, self._steps = turns, steps
        self._engine: Engine | None = None
        self._engine_s = 0.0
        self.bare: list[Cost] = []  # mean steps by turn
        self.trainer: list[Cost] = []

    def make_engine(self, *arguments: Any) -> Engine:
        engine = self._engine = make_engine(*arguments)
        for verb in ("backward", "step"):
            setattr(engine, verb, self.timed(getattr(engine, verb)))
        return engine

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, with its time added up."""

        def calling(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = call(*arguments, **options)
            self._engine_s += time.perf_counter() - began
            return result

        return calling

    def _now(self) -> Cost:
        synchronise(self._batch.latents.device)
        return Cost(time.perf_counter(), time.process_time(), self._engine_s)

    def batches(self, *_: Any, **__: Any) -> Generator[InMemory, None, None]:
        coded = InMemory(tuple(f"sample{number:08}" for number in range(len(self._batch.latents))))
        for _turn in range(self._turns):
            self.bare.append(self._bare_turn())
            marks = []
            for _step in range(self._steps):
                marks.append(self._now())
                for _micro_step in range(self._accumulate):
                    yield coded
            # The trainer asks for the next step: the last one is done, monitored and all.
            marks.append(self._now())
            self.trainer.append(mean_step(marks))
        for _micro_step in range(self._accumulate):
            yield coded  # the trainer's last step also saves

    def _bare_turn(self) -> Cost:
        marks = []
        for _ in range(self._steps):
            marks.append(self._now())
            self._bare_step()
        marks.append(self._now())
        return mean_step(marks)

    def _bare_step(self) -> None:
        engine = self._engine
        assert engine is not None
        step = self.timed(train_step)
        for _ in range(self._accumulate):
            engine.backward(step(engine.module, self._batch, self._params, self.empty_text).total)
        engine.step()


def compare_loops(
    config: Config, world: World, batch: Batch, empty_text: Tensor, folder: Path, turns: int, steps: int
) -> LoopFigures:
    """Both loops in turn, `steps` steps each time; `folder` is empty and for the run."""
    total = turns * steps + 1
    config = replace(
        config,
        data=replace(config.data, validation=""),
        train=replace(config.train, steps=total),
        run=replace(config.run, output=str(folder), resume="never", save_every_steps=total, save_every_minutes=0.0),
        guard=replace(config.guard, hang_s=PATIENCE_S, first_step_s=PATIENCE_S),
    )
    accumulate = accumulation_steps(config.train.global_batch, world.size, config.train.micro_batch)
    both = Alternation(batch, empty_text, step_params(config), accumulate, turns, steps)
    stand_ins: dict[str, Any] = {
        "open_data": lambda *_: both,
        "BatchMaker": lambda *_: GivenBatch(batch),
        "make_engine": both.make_engine,
        "train_step": both.timed(train_step),
        "load_model": lambda config, device, identity: random_model(config, device),
        "base_identity": lambda config: "",
    }
    with StopRequest(folder) as stop, patch.multiple(job, **stand_ins):
        lease = RunFolder.claim(folder) if world.rank == 0 else None
        watch = Watch(folder, world.rank, world.size, hang_s=PATIENCE_S, first_step_s=PATIENCE_S)
        try:
            job.train(config, frozenset(), world, lease, stop, watch)
        except BaseException as error:
            watch.fail(error)
        dist.barrier()
        watch.close()
        if lease:
            lease.release()
    return figures(both.bare, both.trainer, steps - 1)


def random_model(config: Config, device: torch.device) -> FantasyWorldModel:
    return build_model(world_params(config), PRECISIONS[config.train.precision].params, device, config.train.seed)


def figures(bare: Sequence[Cost], trainer: Sequence[Cost], counted: int) -> LoopFigures:
    def middle(costs: Sequence[Cost]) -> Cost:
        return Cost(*map(statistics.median, zip(*costs, strict=True)))

    def ratio(pick: Callable[[Cost], float]) -> Ratio:
        ours, theirs = list(map(pick, trainer)), list(map(pick, bare))
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
        first, _, third = statistics.quantiles(ratios, n=4)
        return Ratio(statistics.median(ratios), (first, third), sum(ours) / sum(theirs))

    return LoopFigures(
        middle(bare),
        middle(trainer),
        ratio(lambda cost: cost.wall_s),
        ratio(lambda cost: cost.cpu_s),
        statistics.median(cost.wall_s - cost.engine_s for cost in trainer),
        len(bare),
        len(bare) * counted,
    )


def mean_step(marks: list[Cost]) -> Cost:
    """From the beginnings of steps and the last one's end, without the first step."""
    count, first, last = len(marks) - 2, marks[1], marks[-1]
    return Cost(*((after - before) / count for before, after in zip(first, last, strict=True)))
