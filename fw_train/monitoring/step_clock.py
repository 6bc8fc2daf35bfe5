"""Where the seconds of a step go: marks on the host, or on the device where work runs behind the host's back."""

import time

import torch


class StepClock:
    """Times of named parts of one step; nothing waits for the device until `seconds` is read."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.begun = time.perf_counter()
        self.waited_s = 0.0
        self._parts: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._last = self.begun
        if self.on_gpu:
            self._record("")

    def mark(self, part: str) -> None:
        """What happened since the last mark belongs to `part`."""
        now = time.perf_counter()
        if part == "data":  # the host waits, the device idles or finishes earlier work
            self.waited_s += now - self._last
        elif not self.on_gpu:
            self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now
        if self.on_gpu:
            self._record(part)

    def parts_s(self) -> dict[str, float]:
        """Seconds of every part; on a GPU as the device saw them, after all work of the step is done."""
        parts = {"data": self.waited_s}
        if not self.on_gpu:
            return parts | self._parts
        self._events[-1][1].synchronize()
        for (_, before), (part, after) in zip(self._events, self._events[1:], strict=False):
            if part != "data":
                parts[part] = parts.get(part, 0.0) + before.elapsed_time(after) / 1000
        return parts

    def total_s(self) -> float:
        return time.perf_counter() - self.begun

    def _record(self, part: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append((part, event))
