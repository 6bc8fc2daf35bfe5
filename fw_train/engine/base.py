"""What the training loop asks of an engine, whichever shards, reduces and steps underneath.

engine = make_engine(model, apply_stage(model, stage_rules(stage)), params, world)
for _ in range(params.accumulate):
    engine.backward(train_step(engine.module, ...).total)
engine.set_learning_rate(rate)
stats = engine.step()
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class StepStats:
    applied: bool  # False: some rank's gradient was not finite, and nothing has changed anywhere
    grad_norm: float  # of the whole gradient over all ranks, before clipping; inf or nan where it was not finite
    # The same by module group, where asked for; their squares add up to its square.
    group_norms: dict[str, float] = field(default_factory=dict)


class Fragment(NamedTuple):
    """A run of one flattened trainable parameter that this rank owns, as live fp32 views of the optimiser's state."""

    name: str  # of the parameter in the plain model
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # in the flattened parameter
    numel: int
    master: Tensor  # [numel]
    exp_avg: Tensor
    exp_avg_sq: Tensor


class StateBytes(NamedTuple):
    """What training costs one rank beside the model's own parameters."""

    optimiser: int  # fp32 copies and both moments
    gradients: int

    @property
    def total(self) -> int:
        return self.optimiser + self.gradients


@dataclass(frozen=True)
class EngineParams:
    kind: Literal["deepspeed", "fsdp2"]
    precision: Literal["bf16", "fp16", "fp32"]
    micro_batch: int
    accumulate: int
    learning_rate: float
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    zero_stage: int = 2  # deepspeed
    cpu_offload: bool = False  # fsdp2


class EngineError(RuntimeError):
    """A combination that an engine cannot run, or a call at the wrong moment."""


class Engine(Protocol):
    module: nn.Module  # the network under its plain names; call it for the forward pass
    settings: dict[str, Any]  # what was derived for the library underneath, as JSON; saved with the run

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of the mean over `accumulate` calls; the last of them reduces over the ranks."""

    def step(self, group_norms: bool = False) -> StepStats:
        """Clips and applies the accumulated gradient, or skips it whole on all ranks; then it is gone.

        `group_norms`, the same on all ranks: also tells the norm of each module group, for one more small all-reduce.
        """

    def discard(self) -> None:
        """Drops the accumulated gradient without a step, after any number of backward passes; all ranks together."""

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the next step; every group keeps its relative rate."""

    def fragments(self) -> list[Fragment]:
        """What this rank owns of masters and moments; between steps only. Together the ranks hold every element once."""

    def optimiser_steps(self) -> int:
        """Applied steps, as Adam's bias correction counts them."""

    def scaler_state(self) -> dict[str, float]:
        """The dynamic loss scale of fp16; empty otherwise."""

    def restore(self, optimiser_steps: int, scaler_state: Mapping[str, float]) -> None:
        """After `fragments` were overwritten: takes over the counts and refreshes the parameters of all ranks."""

    def trainable_weights(self) -> dict[str, Tensor]:
        """Every trainable parameter in the model's dtype on the CPU of rank 0, {} elsewhere; all ranks together."""

    def state_bytes(self) -> StateBytes:
        """Bytes of this rank, counted from the tensors that exist now."""
