"""What a run says on the terminal: a line for each logged step, and a bar below the lines where somebody watches."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

CLEAR_LINE = "\r\x1b[2K"
BAR_CELLS = 30
ETA_WIDTH = 9  # 123:45:06


@dataclass(frozen=True)
class Line:
    """The figures of a logged step; None for what is not known."""

    step: int  # steps done
    total_steps: int
    loss: float | None
    terms: Mapping[str, float | None]  # by short name
    learning_rate: float
    grad_norm: float | None
    seconds_per_step: float
    samples_per_s: float
    mfu_percent: float | None
    data_wait_percent: float
    peak_memory_gib: float
    eta_s: float | None


class Terminal:
    """Writes whole lines; on a terminal the bar stays below them and goes when the run is over."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.interactive = stream.isatty()

    def line(self, text: str) -> None:
        self._write(f"{CLEAR_LINE}{text}\n" if self.interactive else f"{text}\n")

    def progress(self, done: int, total: int, note: str) -> None:
        """Draws the bar anew; the cursor waits at its start, so that other programs' lines replace it."""
        if self.interactive:
            self._write(f"{CLEAR_LINE}{bar(done, total, note, self._columns())}\r")

    def close(self) -> None:
        if self.interactive:
            self._write(CLEAR_LINE)

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80
        except OSError:
            return 80

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # nobody listens any more: the run goes on
            self.interactive = False


def step_line(line: Line) -> str:
    """One line whose parts keep their widths from step to step."""
    parts = [step_count(line.step, line.total_steps), _loss(line), f"lr {line.learning_rate:.1e}"]
    parts += [
        f"grad {number(line.grad_norm)}",
        f"{number(line.seconds_per_step, 5)} s/step",
        f"{number(line.samples_per_s, 5)} samples/s",
    ]
    if line.mfu_percent is not None:
        parts.append(f"MFU {line.mfu_percent:2.0f} %")
    parts += [
        f"data {line.data_wait_percent:4.1f} %",
        f"mem {line.peak_memory_gib:5.1f} GiB",
        f"eta {duration(line.eta_s):>{ETA_WIDTH}}",
    ]
    return "  ".join(parts)


def step_count(step: int, total_steps: int) -> str:
    """Steps done of all."""
    return f"step {step:>{len(str(total_steps))}}/{total_steps}"


def number(value: float | None, width: int = 6) -> str:
    """A number in `width` characters with as many digits as fit; a dash for none."""
    if value is None:
        return "-".rjust(width)
    for decimals in range(width - 2, -1, -1) if math.isfinite(value) else ():
        text = f"{value:.{decimals}f}"
        if len(text) <= width:
            return text
    return f"{value:.0e}".rjust(width) if math.isfinite(value) else str(value).rjust(width)


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds; hours may have any number of digits."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def bar(done: int, total: int, note: str, columns: int) -> str:
    """A bar of the share that is done; never as wide as the terminal, where it would wrap."""
    full = BAR_CELLS * done // max(total, 1)
    text = f"[{'#' * full}{'.' * (BAR_CELLS - full)}] {100 * done / max(total, 1):5.1f} %  {note}"
    return text[: max(columns - 1, 0)]


def _loss(line: Line) -> str:
    terms = " ".join(f"{name} {number(value, 5)}" for name, value in line.terms.items())
    return f"loss {number(line.loss)}" + (f" ({terms})" if terms else "")
