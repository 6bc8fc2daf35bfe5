"""What each rank of an engine owns of the trainable parameters, and the bytes that its state takes: by formula.

ZeRO 1 and 2 lay the parameters of a group end to end and cut the whole into equal runs; ZeRO 3 and FSDP2 cut each
parameter by itself, FSDP2 along its first axis.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from fw_train.checkpoint.fragments import Piece
from fw_train.config import Config
from fw_train.engine.deepspeed import BUCKET
from fw_train.model.world import FantasyWorldModel
from fw_train.precision import PRECISIONS
from fw_train.stages import ParameterGroup

ZERO_ALIGNMENT = 2  # elements a rank: DeepSpeed's runs begin at multiples of 4 bytes of bf16
ZERO_3_LIVE = 1_000_000_000  # parameters that ZeRO 3 keeps gathered at most
ZERO_1_FLAT = 500_000_000  # elements that ZeRO 1 reduces at once
MASTER, MOMENTS, GRADIENT = 4, 8, 4  # bytes of a trained parameter in fp32

Shape = tuple[int, ...]


class EngineMemory(NamedTuple):
    """Bytes on the GPU of the rank that holds the most, besides activations."""

    weights: int
    optimiser: int  # masters and moments
    gradients: int
    buckets: int  # what is gathered or reduced at once

    @property
    def total(self) -> int:
        return sum(self)


class Parameters(NamedTuple):
    """What the formulas need of a network."""

    groups: tuple[dict[str, Shape], ...]  # trainable, by optimiser group, in order
    frozen: dict[str, Shape]
    units: tuple[tuple[str, ...], ...]  # names of the parameters that FSDP2 gathers together
    itemsize: int

    @property
    def trainable(self) -> int:
        return sum(math.prod(shape) for group in self.groups for shape in group.values())

    @property
    def all_shapes(self) -> dict[str, Shape]:
        return self.frozen | {name: shape for group in self.groups for name, shape in group.items()}


def parameters_of(model: FantasyWorldModel, groups: Sequence[ParameterGroup], precision: str) -> Parameters:
    """From the network, which may be on the meta device, and its optimiser groups."""
    named = dict(model.named_parameters())
    by_id = {id(p): name for name, p in named.items()}
    return Parameters(
        tuple({name: tuple(p.shape) for name, p in group.parameters.items()} for group in groups),
        {name: tuple(p.shape) for name, p in named.items() if not p.requires_grad},
        tuple(tuple(by_id[id(p)] for p in unit.module.parameters()) for unit in model.shard_units()),
        PRECISIONS[precision].params.itemsize,
    )


def owned(config: Config, groups: Sequence[Mapping[str, Shape]], rank: int, world: int) -> list[Piece]:
    """The pieces of the trainable parameters whose masters and moments a rank holds."""
    engine = config.engine
    if engine.kind == "fsdp2":
        return [piece for group in groups for name, shape in group.items() for piece in _rows(name, shape, rank, world)]
    if engine.zero_stage == 0:
        return [
            Piece(name, shape, 0, math.prod(shape)) for group in groups for name, shape in group.items() if not rank
        ]
    if engine.zero_stage == 3:
        return [piece for group in groups for name, shape in group.items() for piece in _run(name, shape, rank, world)]
    return [piece for group in groups for piece in _of_flat_group(group, rank, world)]


def engine_memory(config: Config, parameters: Parameters, world: int, accumulate: int) -> EngineMemory:
    """What the configured engine holds on one of `world` GPUs."""
    item, trainable = parameters.itemsize, parameters.trainable
    whole = sum(math.prod(shape) for shape in parameters.all_shapes.values())
    if config.engine.kind == "fsdp2":
        return _fsdp2(config, parameters, world, accumulate)
    stage = config.engine.zero_stage
    if stage == 0:
        return EngineMemory(item * whole, MOMENTS * trainable, GRADIENT * trainable, 0)
    if stage == 3:
        share = sum(-(-math.prod(shape) // world) for shape in parameters.all_shapes.values())
        mine = sum(-(-math.prod(shape) // world) for group in parameters.groups for shape in group.values())
        gathered = item * min(whole, ZERO_3_LIVE) if world > 1 else 0
        return EngineMemory(item * share, (MASTER + MOMENTS) * mine, GRADIENT * mine, gathered + 2 * item * BUCKET)
    mine = sum(_flat_share(group, world) for group in parameters.groups)
    optimiser = (MASTER + MOMENTS) * mine
    if stage == 1:  # gradients are whole on every rank
        buckets = GRADIENT * min(trainable, ZERO_1_FLAT)
        return EngineMemory(item * whole, optimiser, GRADIENT * trainable, buckets)
    # Two buckets in turn in the network's dtype, and one rank's part of one in fp32 on its way.
    buckets = 2 * item * BUCKET + GRADIENT * min(BUCKET, mine)
    return EngineMemory(item * whole, optimiser, GRADIENT * mine, buckets)


def traffic_bytes(config: Config, parameters: Parameters, world: int, accumulate: int) -> int:
    """Bytes that one GPU sends in a step, gradients in fp32 and parameters in the network's dtype."""
    item, trainable, share = parameters.itemsize, parameters.trainable, (world - 1) / world
    whole = sum(math.prod(shape) for shape in parameters.all_shapes.values())
    if config.engine.kind == "fsdp2" or config.engine.zero_stage == 3:
        # every pass gathers all weights in forward and what trains again in backward
        gathers = accumulate * item * (whole + trainable)
        reductions = GRADIENT * trainable * (1 if config.engine.kind == "fsdp2" else accumulate)
        return round(share * (gathers + reductions))
    if config.engine.zero_stage == 2:  # reduces in every pass
        return round(share * (accumulate * GRADIENT + item) * trainable)
    return round(share * (2 * GRADIENT + (item if config.engine.zero_stage else 0)) * trainable)


def _of_flat_group(group: Mapping[str, Shape], rank: int, world: int) -> Iterator[Piece]:
    share = _flat_share(group, world)
    first, last, offset = rank * share, (rank + 1) * share, 0
    for name, shape in group.items():
        numel = math.prod(shape)
        start, end = max(first, offset), min(last, offset + numel)
        if start < end:
            yield Piece(name, shape, start - offset, end - start)
        offset += numel


def _flat_share(group: Mapping[str, Shape], world: int) -> int:
    """Elements of a group that each rank masters, padding included."""
    numel = sum(math.prod(shape) for shape in group.values())
    return ZERO_ALIGNMENT * -(-numel // (ZERO_ALIGNMENT * world))


def _run(name: str, shape: Shape, rank: int, world: int) -> Iterator[Piece]:
    numel = math.prod(shape)
    share = -(-numel // world)
    start, end = min(numel, rank * share), min(numel, (rank + 1) * share)
    if start < end:
        yield Piece(name, shape, start, end - start)


def _rows(name: str, shape: Shape, rank: int, world: int) -> Iterator[Piece]:
    rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    share = -(-rows // world)
    start, end = min(rows, rank * share), min(rows, (rank + 1) * share)
    if start < end:
        yield Piece(name, shape, start * width, (end - start) * width)


def _fsdp2(config: Config, parameters: Parameters, world: int, accumulate: int) -> EngineMemory:
    item, shapes = parameters.itemsize, parameters.all_shapes
    trains = {name for group in parameters.groups for name in group}

    def share(names: Iterator[str]) -> int:
        """Elements of the rank with the most, rank 0."""
        return sum(piece.numel for name in names for piece in _rows(name, shapes[name], 0, world))

    mine, frozen = share(iter(trains)), share(iter(parameters.frozen))
    in_units = {name for unit in parameters.units for name in unit}
    unit_sizes = [sum(math.prod(shapes[name]) for name in unit) for unit in parameters.units]
    trained_units = [size for unit, size in zip(parameters.units, unit_sizes, strict=True) if trains.intersection(unit)]
    rest = sum(math.prod(shape) for name, shape in shapes.items() if name not in in_units)
    # Two units gathered, the rest of the network, and one unit's gradients in both dtypes while they are reduced.
    buckets = item * (rest + 2 * max(unit_sizes)) + (item + GRADIENT) * max(trained_units, default=0)
    gradients = GRADIENT * (mine + (parameters.trainable if accumulate > 1 else 0))
    if config.engine.cpu_offload:
        return EngineMemory(0, 0, GRADIENT * parameters.trainable if accumulate > 1 else 0, buckets)
    return EngineMemory(item * frozen, (MASTER + MOMENTS) * mine, gradients, buckets)
