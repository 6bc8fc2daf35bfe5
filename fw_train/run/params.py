"""From the configuration to the small parameter classes that the parts of a run take."""

from dataclasses import fields

from fw_train.checkpoint.saver import SaveParams
from fw_train.config import Config
from fw_train.engine.base import EngineParams
from fw_train.losses import LossParams
from fw_train.precision import PRECISIONS
from fw_train.step import StepParams


def engine_params(config: Config, accumulate: int) -> EngineParams:
    train, engine = config.train, config.engine
    return EngineParams(
        kind=engine.kind,
        precision=train.precision,
        micro_batch=train.micro_batch,
        accumulate=accumulate,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        zero_stage=engine.zero_stage,
        cpu_offload=engine.cpu_offload,
    )


def save_params(config: Config) -> SaveParams:
    run = config.run
    return SaveParams(
        every_steps=run.save_every_steps,
        every_s=60 * run.save_every_minutes,
        keep_last=run.keep_last,
        keep_every=run.keep_every_steps,
        max_unsaved_s=60 * run.max_unsaved_minutes,
    )


def step_params(config: Config) -> StepParams:
    train = config.train
    return StepParams(
        stage=train.stage,
        dtype=PRECISIONS[train.precision].compute,
        seed=train.seed,
        shift=config.flow.shift,
        camera_drop=train.camera_drop,
        text_drop=train.text_drop,
        losses=LossParams(**{field.name: getattr(config.loss, field.name) for field in fields(config.loss)}),
    )
