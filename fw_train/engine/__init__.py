"""The engines behind one Protocol; nothing outside this folder names one."""

from collections.abc import Sequence

from fw_train.dist import World
from fw_train.engine.base import Engine, EngineError, EngineParams, Fragment, StateBytes, StepStats
from fw_train.model.world import FantasyWorldModel
from fw_train.stages import ParameterGroup

__all__ = ["Engine", "EngineError", "EngineParams", "Fragment", "StateBytes", "StepStats", "make_engine"]


def make_engine(
    model: FantasyWorldModel, groups: Sequence[ParameterGroup], params: EngineParams, world: World
) -> Engine:
    """Hands the model to an engine, which shards it in place; only the engine that is asked for is imported."""
    if not groups:
        raise EngineError("no parameter trains; the stage's rules must leave at least one trainable")
    if params.kind == "deepspeed":
        from fw_train.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, groups, params, world)
    from fw_train.engine.fsdp2 import Fsdp2Engine

    return Fsdp2Engine(model, groups, params, world)
