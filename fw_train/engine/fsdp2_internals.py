"""What PyTorch's FSDP2 keeps to itself and dropping an accumulation must reach, under the names of 2.11 and of 2.12 and later."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def accumulated_gradients(model: nn.Module) -> list[Tensor]:
    """Whole gradients that were not reduced over the ranks yet."""
    waiting = [record.unsharded_accumulated_grad for record in _parameter_records(model)]
    return [gradient for gradient in waiting if gradient is not None]


def drop_accumulated_gradients(model: nn.Module) -> None:
    for record in _parameter_records(model):
        record.unsharded_accumulated_grad = None
        if hasattr(record, "_unsharded_param"):  # gathered at least once
            record._unsharded_param.grad = None


def _parameter_records(model: nn.Module) -> Iterator[Any]:
    """PyTorch's own record of every parameter."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            # 2.11 has one group or none, later versions a list and a property under the old name
            groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
            for group in groups:
                if group is not None:
                    yield from group.fsdp_params
