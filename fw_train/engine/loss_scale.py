"""The dynamic loss scale of fp16: halved by a step that overflowed, doubled after many that did not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

GROWTH_STEPS = 2000
SMALLEST = 1.0


@dataclass
class LossScale:
    value: float = 2.0**16
    good_steps: int = 0  # since the last change

    def update(self, finite: bool) -> None:
        self.good_steps += 1
        if not finite:
            self.value, self.good_steps = max(self.value / 2, SMALLEST), 0
        elif self.good_steps == GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2, 0

    def state(self) -> dict[str, float]:
        return {"loss_scale": self.value, "good_steps": self.good_steps}

    @classmethod
    def from_state(cls, state: Mapping[str, float]) -> Self:
        return cls(state["loss_scale"], int(state["good_steps"]))
