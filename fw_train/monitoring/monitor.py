"""What a run writes about itself: a line on the terminal, metrics.jsonl and TensorBoard (docs/monitoring.md has the tags).

One rank has a monitor, the others a silent one, so that the loop treats them alike. The loop only adds up numbers here;
drawing and writing happen in the background, and no full disk ends a run.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from fw_train.monitoring.background import Background
from fw_train.monitoring.metrics_file import append_line, drop_after, json_line
from fw_train.monitoring.step_figures import RunFacts, StepRecord, Totals, bin_names, interval_figures
from fw_train.monitoring.terminal import Line, Terminal, duration, number, step_count, step_line
from fw_train.pictures.scene import Scene, bars_picture, camera_sheet, cloud, depth_sheet

METRICS, EVENTS = "metrics.jsonl", "tensorboard"
CLOSE_WAIT_S = 60.0
JUDGED_BY = (
    "validation/depth_loss",
    "validation/point_loss",
    "validation/camera_loss",
    "validation/diffusion",
    "throughput/samples_per_s",
)
CHARTS = {
    "training/losses": ("loss/",),
    "training/gradient norm by group": ("optimiser_gradient_norm/",),
    "training/gates": ("optimiser_gates/",),
    "training/where a step's seconds go": ("step_parts/",),
    "validation/diffusion by timestep": ("validation_diffusion_by_timestep/",),
}


class Monitor:
    """Writes to `folder`, the run's; a run that goes on at `first_step` replaces what was written about later steps."""

    def __init__(
        self,
        folder: Path,
        facts: RunFacts,
        *,
        log_every_steps: int,
        stream: TextIO,
        first_step: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from fw_train.monitoring.event_files import EventFiles  # seconds to import, and only one rank needs it

        self.facts, self.log_every_steps = facts, log_every_steps
        self.metrics = folder / METRICS
        self._clock = clock
        self._terminal = Terminal(stream)
        self._records: list[StepRecord] = []
        self._terms: dict[str, None] = {}  # every loss seen so far, so that lines keep their columns
        self._noted: tuple[int, list[str]] = first_step, []  # the last step with events
        self._first: tuple[int, float] | None = None  # the first step of this start, and when it was done
        folder.mkdir(parents=True, exist_ok=True)
        self._totals = _totals(drop_after(self.metrics, first_step))
        self._events = EventFiles(folder / EVENTS, first_step)
        self._background = Background("monitoring")
        self._introduce(first_step)

    def step(self, record: StepRecord) -> None:
        """Takes a step into account; logs the interval every `log_every_steps`, after the first step and after the last."""
        now, done = self._clock(), record.step + 1
        first = self._first is None
        self._first = self._first or (done, now)
        self._records.append(record)
        self._totals = self._totals.plus(record)
        self._terms |= dict.fromkeys(name for name in record.losses if name != "loss/total")
        if not record.applied:
            self._skipped(record)
        if first or done % self.log_every_steps == 0 or done == self.facts.total_steps:
            self._log(done, now)
        eta = self._eta_s(done, now)
        self._terminal.progress(
            done, self.facts.total_steps, f"{step_count(done, self.facts.total_steps)}  eta {duration(eta)}"
        )

    def validation(self, step: int, values: dict[str, float], bins: dict[str, list[float]] | None) -> None:
        """Figures on held-out clips after `step` steps; bins are losses by rising timestep."""
        figures = dict(values)
        for name, losses in (bins or {}).items():
            group, names = name.replace("/", "_"), bin_names(len(losses))
            figures |= {f"{group}/{part}": loss for part, loss in zip(names, losses, strict=True)}
            self._later(partial(self._draw_bars, step, name, losses, names))
        self._write("validation", step, {**values, **(bins or {})})
        self._later(lambda: self._events.scalars(step, figures))
        shown = "  ".join(f"{name.removeprefix('validation/')} {number(value)}" for name, value in values.items())
        self._terminal.line(f"{step_count(step, self.facts.total_steps)}  validation: {shown}")

    def pictures(self, step: int, scene: Scene) -> None:
        """What the network predicts for a held-out clip after `step` steps; drawn later, from arrays that nobody changes."""
        self._later(lambda: self._events.picture(step, "pictures/depth", depth_sheet(scene)))
        self._later(lambda: self._events.picture(step, "pictures/camera_path", camera_sheet(scene)))
        self._later(partial(self._draw_cloud, step, scene))

    def event(self, step: int, text: str) -> None:
        """A warning or a note worth keeping, after `step` steps; why a step was skipped, too, with what its caller knows."""
        self._terminal.line(f"{step_count(step, self.facts.total_steps)}  {text}")
        self._write("event", step, {"text": text})
        before, texts = self._noted
        texts = [*texts, text] if before == step else [text]  # TensorBoard shows one text a step
        self._noted = step, texts
        self._later(lambda: self._events.text(step, "events", "\n".join(texts)))

    def close(self) -> None:
        """Writes what is left and returns when it is on its way to the disk."""
        if self._records:
            self._log(self._records[-1].step + 1, self._clock())
        self._terminal.close()
        self._later(self._events.close)
        self._background.close(CLOSE_WAIT_S)

    def _introduce(self, step: int) -> None:
        facts = self.facts
        known = {
            name: getattr(facts, name) for name in ("total_steps", "global_batch", "world_size", "flops_per_sample",
                                                    "tokens_per_sample", "peak_flops_per_gpu", "code_version")
        }  # fmt: skip
        self._write("run", step, known)
        summary = "\n".join(f"{name}: {value}" for name, value in known.items())
        events = self._events
        self._later(lambda: events.text(step, "run/facts", summary))
        self._later(lambda: events.text(step, "run/config", facts.config_text))
        self._later(lambda: events.hparams(facts.hparams, JUDGED_BY))
        self._later(lambda: events.charts(CHARTS))

    def _log(self, done: int, now: float) -> None:
        records, self._records = self._records, []
        last, facts = records[-1], self.facts
        figures = interval_figures(records, facts, self._totals)
        last_values = {**last.losses, "optimiser/gradient_norm": last.grad_norm}
        self._write("step", done, {"steps": len(records), **figures, "last": last_values})
        self._later(lambda: self._events.scalars(done, figures))
        line = Line(
            step=done,
            total_steps=facts.total_steps,
            loss=figures.get("loss/total"),
            terms={_short(name): figures.get(name) for name in self._terms},
            learning_rate=next(iter(last.learning_rates.values())),
            grad_norm=figures.get("optimiser/gradient_norm"),
            seconds_per_step=figures["throughput/seconds_per_step"],
            samples_per_s=figures["throughput/samples_per_s"],
            mfu_percent=figures.get("throughput/mfu_percent"),
            data_wait_percent=figures["throughput/data_wait_percent"],
            peak_memory_gib=figures["throughput/peak_memory_gib"],
            eta_s=self._eta_s(done, now),
        )
        self._terminal.line(step_line(line))

    def _skipped(self, record: StepRecord) -> None:
        done = record.step + 1
        values = {"reason": record.reason, **record.losses, "optimiser/gradient_norm": record.grad_norm}
        self._write("skipped", done, values)

    def _eta_s(self, done: int, now: float) -> float | None:
        """By the wall clock since the first step of this start, so that validation and saves count as they come."""
        assert self._first is not None
        first, begun = self._first
        return (now - begun) / (done - first) * (self.facts.total_steps - done) if done > first else None

    def _draw_bars(self, step: int, name: str, losses: list[float], names: list[str]) -> None:
        starts = [str(int(part[1:5])) for part in names]
        self._events.picture(step, name, bars_picture(losses, starts, f"{name} after {step} steps"))

    def _draw_cloud(self, step: int, scene: Scene) -> None:
        points = cloud(scene)
        if len(points.vertices):
            self._events.cloud(step, "points/true_and_predicted", points)

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        line = json_line({"kind": kind, "step": step, "time": round(time.time(), 3), **values})
        self._later(partial(append_line, self.metrics, line))

    def _later(self, work: Callable[[], None]) -> None:
        self._background.submit(work)


class _SilentMonitor(Monitor):
    def __init__(self) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        pass

    def validation(self, step: int, values: dict[str, float], bins: dict[str, list[float]] | None) -> None:
        pass

    def pictures(self, step: int, scene: Scene) -> None:
        pass

    def event(self, step: int, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def silent_monitor() -> Monitor:
    """The monitor of the ranks that do not write."""
    return _SilentMonitor()


def _totals(lines: list[dict[str, Any]]) -> Totals:
    """Where the counts of a resumed run go on."""
    steps = [line for line in lines if line["kind"] == "step"]
    last = steps[-1] if steps else {}
    return Totals(**{name: int(last.get(f"samples/{name}", 0)) for name in vars(Totals())})


def _short(name: str) -> str:
    return name.removeprefix("loss/").removesuffix("_loss")
