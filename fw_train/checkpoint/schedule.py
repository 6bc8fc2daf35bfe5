"""When to save: by steps, by time, and again after a failure."""


class SaveSchedule:
    """Knows one clock, rank 0's: ranks that asked their own clocks would disagree about the step to save at."""

    def __init__(self, every_steps: int, every_s: float, retry_s: float, step: int, now_s: float) -> None:
        self._every_steps, self._every_s, self._retry_s = every_steps, every_s, retry_s
        self._step, self._time_s = step, now_s  # of the last save that was started
        self._retry_at: float | None = None

    def due(self, step: int, now_s: float) -> bool:
        """Whether to save after `step` steps; stays true until a save is started, so that one put off is made up for."""
        if self._retry_at is not None:
            return step > self._step and now_s >= self._retry_at
        by_steps = step // self._every_steps > self._step // self._every_steps
        by_time = self._every_s > 0 and now_s - self._time_s >= self._every_s
        return step > self._step and (by_steps or by_time)

    def started(self, step: int, now_s: float) -> None:
        self._step, self._time_s, self._retry_at = step, now_s, None

    def failed(self, now_s: float) -> None:
        """The last save came to nothing: the next one is due at the first step after the pause."""
        self._retry_at = now_s + self._retry_s
