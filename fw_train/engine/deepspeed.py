"""DeepSpeed ZeRO behind the engine's verbs: stages 1, 2 and 3, and stage 0 in fp32.

The training loop never meets DeepSpeed's own schedule, logging, checkpoints or launcher, and nothing is compiled at run time.
Fragments are found by storage address, because DeepSpeed's own tables are wrong for some of its options.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as c10d
from torch import Tensor, nn

from fw_train.dist import World, all_sum
from fw_train.engine.base import EngineError, EngineParams, Fragment, StateBytes, StepStats
from fw_train.engine.group_norms import norms_by_group
from fw_train.engine.state import adam_steps, fill_adam_state, moments, set_adam_steps, storage_bytes
from fw_train.optimiser import make_optimiser, set_learning_rate
from fw_train.stages import ParameterGroup

BUCKET = 100_000_000  # elements that are reduced or gathered at once; DeepSpeed's 500 million cost 2 GB each


def deepspeed_json(params: EngineParams, world: World) -> dict[str, Any]:
    """DeepSpeed's whole configuration; everything that its defaults could change under us is said."""
    problem = _impossible(params)
    if problem:
        raise EngineError(problem)
    config: dict[str, Any] = {
        "train_batch_size": params.micro_batch * params.accumulate * world.size,
        "train_micro_batch_size_per_gpu": params.micro_batch,
        "gradient_accumulation_steps": params.accumulate,
        "gradient_clipping": params.max_grad_norm if params.zero_stage else 0.0,  # stage 0: see `_step_unsharded`
        "zero_allow_untested_optimizer": True,  # the optimiser is torch's AdamW
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": params.zero_stage,
            "overlap_comm": world.device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "round_robin_gradients": False,
        },
    }
    if params.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return config


def _impossible(params: EngineParams) -> str | None:
    if params.zero_stage not in (0, 1, 2, 3):
        return f"zero_stage={params.zero_stage}; ZeRO has the stages 0, 1, 2 and 3"
    if params.precision == "fp16":
        return "DeepSpeed refuses fp16 on CPU and is not tested with it here; use the engine fsdp2, or precision bf16"
    if params.precision == "bf16" and params.zero_stage == 0:
        return "zero_stage=0 cannot accumulate bf16 gradients in fp32; use zero_stage 1, 2 or 3, or precision fp32"
    if params.cpu_offload:
        return "cpu_offload belongs to the engine fsdp2; with DeepSpeed raise zero_stage instead"
    return None


class Owned(NamedTuple):
    """What one rank masters of one parameter, in elements from the beginning of the parameter's group."""

    parameter: nn.Parameter
    offset: int  # of the parameter
    first: int
    last: int  # exclusive


class Partition(NamedTuple):
    """One parameter group of ZeRO 1 and 2: all its parameters end to end, of which this rank masters one run."""

    parameters: list[nn.Parameter]
    low: Tensor  # the whole group in the model's dtype; the parameters are views of it
    master: Tensor  # fp32, this rank's run
    start: int  # of the run in the group

    def owned(self) -> Iterator[Owned]:
        end = self.start + self.master.numel()
        for p in self.parameters:
            offset = (p.data_ptr() - self.low.data_ptr()) // p.element_size()
            first, last = max(offset, self.start), min(offset + p.numel(), end)
            if first < last:
                yield Owned(p, offset, first, last)


class DeepSpeedEngine:
    def __init__(self, model: nn.Module, groups: Sequence[ParameterGroup], params: EngineParams, world: World) -> None:
        self.settings = deepspeed_json(params, world)
        self.params = params
        self.module = model
        self._world = world
        self._names = {id(p): name for group in groups for name, p in group.parameters.items()}
        self._trainable = [p for group in groups for p in group.parameters.values()]
        base = make_optimiser(groups, params.learning_rate, params.weight_decay)
        deepspeed = import_deepspeed(world)
        self._library: Any = deepspeed
        with _local_rank_in_environment(world):
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=base, config=self.settings, dist_init_required=False
            )
        self._zero: Any = None  # DeepSpeed's optimiser around ours; stage 0 has none
        self._base = base
        if params.zero_stage:
            self._zero = self._engine.optimizer
            self._base = self._zero.optimizer
        self._micro_steps = 0
        fill_adam_state(self._base, self._masters())

    def backward(self, loss: Tensor) -> None:
        if self._micro_steps == self.params.accumulate:
            raise EngineError(f"all {self._micro_steps} micro-batches of this step are in; call step() or discard()")
        self._micro_steps += 1
        self._engine.set_gradient_accumulation_boundary(self._micro_steps == self.params.accumulate)
        if self._zero is not None:
            # What DeepSpeed's own forward would do; the network is called by itself here, under its plain names.
            self._zero.clear_backward_seen_flag()
            loss.register_hook(lambda _: self._engine._backward_prologue())
        self._engine.backward(loss)

    def step(self, group_norms: bool = False) -> StepStats:
        if self._micro_steps != self.params.accumulate:
            raise EngineError(f"step() after {self._micro_steps} of {self.params.accumulate} micro-batches")
        self._micro_steps = 0
        by_group = self._group_norms() if group_norms else {}
        if self._zero is None:
            return self._step_unsharded(by_group)
        self._engine.step()
        return StepStats(self._engine.was_step_applied(), float(self._engine.get_global_grad_norm()), by_group)

    def _step_unsharded(self, by_group: dict[str, float]) -> StepStats:
        """Stage 0: DeepSpeed would apply what is not finite."""
        gradients = [p for p in self._trainable if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(gradients, self.params.max_grad_norm)
        if not norm.isfinite():  # the same on all ranks: their gradients are
            self._engine.zero_grad()
            return StepStats(False, float(norm), by_group)
        self._engine.step()
        return StepStats(True, float(norm), by_group)

    def _group_norms(self) -> dict[str, float]:
        pieces = list(self._reduced_gradients())
        norms = torch._foreach_norm([gradient for _, gradient in pieces]) if pieces else ()
        named = zip((self._names[id(p)] for p, _ in pieces), norms, strict=True)
        # without ZeRO every rank has everything
        return norms_by_group(self._names.values(), named, all_sum if self._zero is not None else lambda total: total)

    def _reduced_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Of this rank's partition, where the last backward pass left them; never copies."""
        zero = self._zero
        if zero is None:
            yield from ((p, p.grad) for p in self._trainable if p.grad is not None)
        elif self.params.zero_stage == 3:
            for index, parameters in enumerate(zero.fp16_groups):
                yield from zip(parameters, zero.averaged_gradients[index], strict=True)
        else:
            for index, part in enumerate(partitions(zero)):
                if hasattr(zero, "fp32_groups_gradients_flat"):  # whole on every rank
                    flat = zero.fp32_groups_gradients_flat[index]
                    yield from ((own.parameter, flat[own.first : own.last]) for own in part.owned())
                else:
                    yield from _averaged(part, zero.averaged_gradients[index])

    def discard(self) -> None:
        self._micro_steps = 0
        zero = self._zero
        if zero is None:
            self._engine.zero_grad()
            return
        zero.zero_grad()
        if self.params.zero_stage == 3:
            zero._pre_step()
            zero.averaged_gradients = {}
        elif hasattr(zero, "averaged_gradients"):
            zero._release_preflattened_grad_buffers()
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = None
            for group in zero.all_grad_tensors:
                zero.all_grad_tensors[group] = None
            zero.micro_step_id = -1  # as after a step

    def set_learning_rate(self, rate: float) -> None:
        set_learning_rate(self._base, rate)

    def fragments(self) -> list[Fragment]:
        if self._micro_steps:
            raise EngineError("fragments() in the middle of an accumulation; call it between steps")
        if self.params.zero_stage == 3:
            return list(self._fragments_of_stage_3())
        if self._zero is None:  # every rank has everything; the first speaks for all
            parameters = self._trainable if self._world.rank == 0 else []
            return [self._fragment(p, p.shape, 0, p.numel(), p, 0) for p in parameters]
        fragments = []
        for part in partitions(self._zero):
            for p, offset, first, last in part.owned():
                fragment = self._fragment(p, p.shape, first - offset, last - first, part.master, first - part.start)
                _check_rounded(fragment, part.low[first:last])
                fragments.append(fragment)
        return fragments

    def _fragments_of_stage_3(self) -> Iterator[Fragment]:
        p: Any  # a parameter with DeepSpeed's attributes
        for p in self._trainable:
            group, offset, numel = self._zero.grad_position[self._zero.get_param_id(p)]
            start = self._world.rank * numel
            numel = min(numel, p.ds_numel - start)  # the last ranks may hold padding alone
            if numel > 0:
                master = self._zero.fp32_partitioned_groups_flat[group]
                fragment = self._fragment(p, p.ds_shape, start, numel, master, offset)
                _check_rounded(fragment, p.ds_tensor.view(-1)[:numel])
                yield fragment

    def _fragment(
        self, parameter: nn.Parameter, shape: Sequence[int], start: int, numel: int, master: Tensor, offset: int
    ) -> Fragment:
        """`numel` elements from `offset` of a flat master and of its moments."""
        state = self._base.state[master]
        views = (t.detach().view(-1)[offset : offset + numel] for t in (master, state["exp_avg"], state["exp_avg_sq"]))
        return Fragment(self._names[id(parameter)], tuple(shape), start, numel, *views)

    def optimiser_steps(self) -> int:
        return adam_steps(self._base)

    def scaler_state(self) -> dict[str, float]:
        return {}

    def restore(self, optimiser_steps: int, scaler_state: Mapping[str, float]) -> None:
        if scaler_state:
            raise EngineError(f"a loss scale ({dict(scaler_state)}) without fp16; resume with the run's own precision")
        set_adam_steps(self._base, optimiser_steps)
        if self._zero is None:
            for p in self._trainable:
                state = self._base.state[p]
                for tensor in (p.data, state["exp_avg"], state["exp_avg_sq"]):
                    c10d.broadcast(tensor, src=0)
        elif self.params.zero_stage == 3:
            for group in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            self._zero._partition_all_parameters()
            self._zero._post_step(set())
        else:
            self._zero._hp_optimizer_states_linked = False
            self._zero.update_lp_params()

    def trainable_weights(self) -> dict[str, Tensor]:
        weights = {}
        for p in self._trainable:
            with self._library.zero.GatheredParameters([p], enabled=self.params.zero_stage == 3):
                if self._world.rank == 0:
                    weights[self._names[id(p)]] = p.detach().to("cpu", copy=True)
        return weights

    def state_bytes(self) -> StateBytes:
        masters = [] if self._zero is None else self._masters()  # without ZeRO the parameters are the masters
        optimiser = storage_bytes([*masters, *moments(self._base)])
        return StateBytes(optimiser, storage_bytes([*(p.grad for p in self._trainable), *self._gradient_buffers()]))

    def _masters(self) -> list[Tensor]:
        if self._zero is None:
            return list(self._trainable)
        if self.params.zero_stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return [part.master for part in partitions(self._zero)]

    def _gradient_buffers(self) -> list[Tensor]:
        zero = self._zero
        if zero is None:
            return []
        if self.params.zero_stage == 3:
            return [zero.grad_partitions_flat_buffer]
        if hasattr(zero, "fp32_groups_gradients_flat"):
            return list(zero.fp32_groups_gradients_flat)
        groups = [*zero.averaged_gradients.values(), *zero.all_grad_tensors.values()]
        return [tensor for group in groups if group is not None for tensor in group]


def import_deepspeed(world: World) -> Any:
    """DeepSpeed for this device, without probing, compiling or announcing anything."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops
    import deepspeed.utils

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if world.device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # else a shared-memory kernel is compiled for half a minute
    return deepspeed


@contextmanager
def _local_rank_in_environment(world: World) -> Iterator[None]:
    """DeepSpeed insists on the variable; left behind, it would be half of a launcher's set to every process started later."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]


def partitions(zero: Any) -> list[Partition]:
    """The groups of either optimiser that DeepSpeed uses for ZeRO 1 and 2."""
    if hasattr(zero, "bf16_groups"):
        tables = (zero.bf16_groups, zero.bf16_groups_flat, zero.fp32_groups_flat_partition)
    else:
        tables = (zero.bit16_groups, zero.bit16_groups_flat, zero.single_partition_of_fp32_groups)
    return [
        Partition(parameters, low, master, c10d.get_rank(group) * master.numel())
        for parameters, low, master, group in zip(*tables, zero.real_dp_process_group, strict=True)
    ]


def _averaged(part: Partition, gradients: Sequence[Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """DeepSpeed lists a partition's gradients in the order of the parameters, with padding between and behind them."""
    pieces = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    for own, piece in zip(part.owned(), pieces, strict=False):  # fp32's padding at the end is not marked
        assert piece.numel() == own.last - own.first, "DeepSpeed's gradients are not in the order of its parameters"
        yield own.parameter, piece


def _check_rounded(fragment: Fragment, low: Tensor) -> None:
    assert torch.equal(fragment.master.to(low.dtype), low), (
        f"{fragment.name}: the parameter is not its fp32 master rounded to {low.dtype}"
    )
