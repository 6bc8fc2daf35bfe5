"""Jobs in several processes, and how far they are."""

import argparse
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

_counter: Any = None  # of a worker process, shared with the one that started it


class Progress:
    """A line on stderr with rate and remaining time: redrawn on a terminal, else written every half minute."""

    def __init__(self, total: int, unit: str) -> None:
        self._total, self._unit = total, unit
        self._start = self._shown = time.monotonic()
        self._on_terminal = sys.stderr.isatty()
        self.done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.done:
            self._show("\n")

    def advance(self, count: int) -> None:
        self.set(self.done + count)

    def set(self, done: int) -> None:
        self.done = done
        now = time.monotonic()
        if now - self._shown >= (0.2 if self._on_terminal else 30):
            self._shown = now
            self._show("" if self._on_terminal else "\n")

    def text(self, seconds: float) -> str:
        """The line after so many seconds."""
        rate = self.done / max(seconds, 1e-9)
        left = (self._total - self.done) / rate if rate else 0.0
        minutes, rest = divmod(round(left), 60)
        remaining = f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if rate else "?"
        return f"{self.done}/{self._total} {self._unit}, {rate:.2f} {self._unit}/s, {remaining} left"

    def _show(self, end: str) -> None:
        line = self.text(time.monotonic() - self._start)
        print(f"\r{line:<70}" if self._on_terminal else line, end=end, file=sys.stderr, flush=True)


def add_workers(parser: argparse.ArgumentParser, cost: str) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help=f"processes ({cost}); 1 works in this one (default: one for each core)",
    )


def run_parallel(
    work: Callable[[Job, Callable[[int], None]], Result], jobs: Sequence[Job], workers: int, progress: Progress
) -> Iterator[Result]:
    """Results in the order of the jobs; `work` reports what it has done to its second argument."""
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least one is needed")
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield work(job, progress.advance)
        return
    context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may hang
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, (counter,))
    try:
        futures = [pool.submit(_work, work, job) for job in jobs]
        for future in futures:
            while not future.done():
                wait([future], timeout=0.5, return_when=FIRST_COMPLETED)
                progress.set(counter.value)
            yield future.result()
        progress.set(counter.value)
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed, most likely for lack of memory; run again with fewer --workers, which continues"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(counter: Any) -> None:
    global _counter
    _counter = counter
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Workers of a killed process would stay, and go on writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(work: Callable[[Job, Callable[[int], None]], Result], job: Job) -> Result:
    return work(job, _count)


def _count(done: int) -> None:
    with _counter.get_lock():
        _counter.value += done
