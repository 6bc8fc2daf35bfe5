"""PyTorch FSDP2 behind the engine's verbs: `fully_shard` over the model's shard units.

Groups with a trainable parameter hold fp32 shards, which are the masters, and are gathered in the model's dtype; frozen groups
stay in the model's dtype. The optimiser works on this rank's plain shards, so that a step costs no DTensor bookkeeping.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fw_train.dist import World, all_sum
from fw_train.engine.base import EngineError, EngineParams, Fragment, StateBytes, StepStats
from fw_train.engine.fsdp2_internals import accumulated_gradients, drop_accumulated_gradients
from fw_train.engine.group_norms import norms_by_group
from fw_train.engine.loss_scale import LossScale
from fw_train.engine.state import adam_steps, fill_adam_state, moments, set_adam_steps, storage_bytes
from fw_train.model.world import FantasyWorldModel
from fw_train.optimiser import make_optimiser, set_learning_rate
from fw_train.precision import PRECISIONS
from fw_train.stages import ParameterGroup


class Fsdp2Engine:
    def __init__(
        self, model: FantasyWorldModel, groups: Sequence[ParameterGroup], params: EngineParams, world: World
    ) -> None:
        self.params = params
        self.module: nn.Module = model
        self._world = world
        self._precision = PRECISIONS[params.precision]
        units = shard(model, params, world)
        self.settings: dict[str, Any] = {
            "units": units,
            "param_dtype": str(self._precision.compute),
            "reduce_dtype": str(self._precision.gradients),
            "cpu_offload": params.cpu_offload,
        }
        sharded = dict(model.named_parameters())
        self._sharded: dict[str, DTensor] = {
            name: _as_dtensor(sharded[name]) for group in groups for name in group.parameters
        }
        # Plain views of the shards: the optimiser's parameters, and the masters of the fragments.
        self._local = {name: nn.Parameter(p.to_local().detach()) for name, p in self._sharded.items()}
        local_groups = [g._replace(parameters={name: self._local[name] for name in g.parameters}) for g in groups]
        self._optimiser = make_optimiser(local_groups, params.learning_rate, params.weight_decay)
        fill_adam_state(self._optimiser, self._local.values())
        self._scale = LossScale() if self._precision.loss_scaling else None
        self._micro_steps = 0

    def backward(self, loss: Tensor) -> None:
        if self._micro_steps == self.params.accumulate:
            raise EngineError(f"all {self._micro_steps} micro-batches of this step are in; call step() or discard()")
        self._micro_steps += 1
        self._root.set_requires_gradient_sync(self._micro_steps == self.params.accumulate)
        scale = self._scale.value if self._scale else 1.0
        (loss * (scale / self.params.accumulate)).backward()

    def step(self, group_norms: bool = False) -> StepStats:
        if self._micro_steps != self.params.accumulate:
            raise EngineError(f"step() after {self._micro_steps} of {self.params.accumulate} micro-batches")
        self._micro_steps = 0
        scale = self._scale.value if self._scale else 1.0
        gradients = {name: _as_dtensor(p.grad).to_local() for name, p in self._sharded.items() if p.grad is not None}
        norms = torch._foreach_norm(list(gradients.values())) if gradients else ()  # of gradients that are still scaled
        norm = self._whole_norm(norms) / scale
        by_group = {}
        if group_norms:
            pieces = zip(gradients, norms, strict=True)
            by_group = norms_by_group(self._sharded, ((name, piece / scale) for name, piece in pieces), all_sum)
        finite = bool(norm.isfinite())  # of the sum over ranks: all agree
        if finite:
            factor = torch.clamp(self.params.max_grad_norm / (norm + 1e-6), max=1.0) / scale
            for name, gradient in gradients.items():
                self._local[name].grad = gradient.mul_(factor.to(gradient.device))
            self._optimiser.step()
        if self._scale:
            self._scale.update(finite)
        self._zero_grad()
        return StepStats(finite, float(norm), by_group)

    def _whole_norm(self, norms: Sequence[Tensor]) -> Tensor:
        """From the norms of this rank's shards, over all ranks."""
        stacked = torch.stack(list(norms)) if norms else torch.zeros(1)
        return all_sum(stacked.square().sum().to(self._world.device)).sqrt()

    def discard(self) -> None:
        self._micro_steps = 0
        drop_accumulated_gradients(self.module)
        self._zero_grad()

    def _zero_grad(self) -> None:
        for name, parameter in self._sharded.items():
            parameter.grad = None
            self._local[name].grad = None

    def set_learning_rate(self, rate: float) -> None:
        set_learning_rate(self._optimiser, rate)

    def fragments(self) -> list[Fragment]:
        if self._micro_steps:
            raise EngineError("fragments() in the middle of an accumulation; call it between steps")
        return list(self._fragments())

    def _fragments(self) -> Iterator[Fragment]:
        for name, parameter in self._sharded.items():
            master = self._local[name]
            if master.numel() == 0:  # more ranks than rows
                continue
            _, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            state = self._optimiser.state[master]
            views = (t.detach().view(-1) for t in (master, state["exp_avg"], state["exp_avg_sq"]))
            start = offset[0] * parameter.shape[1:].numel() if offset else 0
            yield Fragment(name, tuple(parameter.shape), start, master.numel(), *views)

    def optimiser_steps(self) -> int:
        return adam_steps(self._optimiser)

    def scaler_state(self) -> dict[str, float]:
        return self._scale.state() if self._scale else {}

    def restore(self, optimiser_steps: int, scaler_state: Mapping[str, float]) -> None:
        if bool(scaler_state) != bool(self._scale):
            raise EngineError(
                f"a loss scale belongs to fp16 alone: saved {dict(scaler_state) or 'none'}, precision {self.params.precision}; "
                f"resume with the precision of the run"
            )
        set_adam_steps(self._optimiser, optimiser_steps)
        if self._scale:
            self._scale = LossScale.from_state(scaler_state)
        for module in self.module.modules():  # a copy gathered for validation would outlive its masters
            if isinstance(module, FSDPModule):
                module.reshard()

    def trainable_weights(self) -> dict[str, Tensor]:
        weights = {}
        for name, parameter in self._sharded.items():
            whole = _as_dtensor(parameter.detach().to(self._precision.params)).full_tensor()
            if self._world.rank == 0:
                weights[name] = whole.to("cpu", copy=True)
        return weights

    def state_bytes(self) -> StateBytes:
        gradients = [*(p.grad for p in self._sharded.values()), *accumulated_gradients(self.module)]
        return StateBytes(storage_bytes([*self._local.values(), *moments(self._optimiser)]), storage_bytes(gradients))

    @property
    def _root(self) -> FSDPModule:
        assert isinstance(self.module, FSDPModule)
        return self.module


def shard(model: FantasyWorldModel, params: EngineParams, world: World) -> list[str]:
    """Wraps the shard units, then frozen parts outside of them, then the rest as the root; returns the names in this order."""
    precision = PRECISIONS[params.precision]
    mesh = init_device_mesh(world.device.type, (world.size,))
    offload = params.cpu_offload and world.device.type == "cuda"

    def wrap(module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        # Inputs are never cast: fp32 rotary tables and time modulation cross the units' borders. Everything is resharded
        # after forward, the root too: what validation gathered must not outlive the next step.
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if any(p.requires_grad for p in parameters):
            lift(parameters, precision.master)
            policy = MixedPrecisionPolicy(precision.compute, precision.gradients, cast_forward_inputs=False)
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
            reshard_after_forward=True,
        )

    parts = [(unit.name, unit.module) for unit in model.shard_units()]
    inside = {id(p) for _, module in parts for p in module.parameters()}
    parts += frozen_parts("", model, inside, never={id(model), id(model.video)})
    inside |= {id(p) for _, module in parts for p in module.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside]
    for _, module in parts:
        wrap(module, list(module.parameters()))
    wrap(model, rest)
    return [*(name for name, _ in parts), "(the rest)"]


def frozen_parts(name: str, module: nn.Module, inside: set[int], never: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules with frozen parameters alone, none of which belongs to a unit; `never` are not called as modules."""
    parameters = list(module.parameters())
    free = [p for p in parameters if id(p) not in inside]
    if not free:
        return
    callable_itself = id(module) not in never and not isinstance(module, nn.ModuleList)
    if callable_itself and len(free) == len(parameters) and not any(p.requires_grad for p in free):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from frozen_parts(f"{name}.{child_name}".lstrip("."), child, inside, never)


def lift(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
    """A group in which something trains holds masters; their values stay those of the model's dtype."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def _as_dtensor(parameter: Any) -> DTensor:
    assert isinstance(parameter, DTensor)
    return parameter
