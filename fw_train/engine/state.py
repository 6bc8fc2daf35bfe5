"""Small pieces that both engines need: Adam's state before the first step, and the bytes that tensors hold."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def fill_adam_state(optimiser: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """What Adam would make at its first step, made now: moments can be restored and counted before any step."""
    for parameter in parameters:
        optimiser.state[parameter] = {
            "step": torch.zeros(
                (), dtype=torch.float32, device=parameter.device if optimiser.defaults["fused"] else "cpu"
            ),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }


def adam_steps(optimiser: torch.optim.Optimizer) -> int:
    """The one step count that all parameters share."""
    counts = {int(state["step"]) for state in optimiser.state.values()}
    assert len(counts) == 1, f"Adam counts different steps for different parameters: {sorted(counts)}"
    return counts.pop()


def set_adam_steps(optimiser: torch.optim.Optimizer, steps: int) -> None:
    for state in optimiser.state.values():
        state["step"].fill_(steps)


def storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages behind the tensors, each counted once; of a sharded tensor, this rank's part."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local if t.numel()}
    return sum(sizes.values())


def moments(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [state[name] for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
