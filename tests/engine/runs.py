"""What the engine tests run in every process: a tiny network, samples by position, training steps."""

from dataclasses import replace

import torch

from fw_train import dist
from fw_train.activation_checkpointing import apply_activation_checkpointing
from fw_train.batch import Batch
from fw_train.build import build_model
from fw_train.engine import EngineParams, make_engine
from fw_train.precision import PRECISIONS
from fw_train.stages import apply_stage, stage_rules
from fw_train.step import StepParams, train_step
from samples import make_batch, tiny_params

RATE = 1e-3


class Run:
    """An engine around a tiny network, and the samples of its steps."""

    def __init__(
        self,
        world,
        kind="deepspeed",
        stage="stage1",
        precision="fp32",
        accumulate=1,
        micro=1,
        recompute="none",
        **params,
    ):
        torch.manual_seed(world.rank)  # nothing may depend on it
        self.world, self.stage, self.accumulate, self.micro = world, stage, accumulate, micro
        self.dtype = PRECISIONS[precision].params
        model = build_model(tiny_params("camera", interaction=stage == "stage2"), self.dtype)
        apply_activation_checkpointing(model.shard_units(), recompute)
        self.groups = apply_stage(model, stage_rules(stage, gate_lr_scale=10))
        self.frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        self.initial = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        self.engine = make_engine(
            model,
            self.groups,
            EngineParams(
                kind=kind,
                precision=precision,
                micro_batch=micro,
                accumulate=accumulate,
                learning_rate=RATE,
                **params,
            ),
            world,
        )
        self.step_params = StepParams(stage=stage, dtype=self.dtype)

    def losses(self, position, scale=1.0):
        batch = samples(self.engine.module.params.wan, range(position, position + self.micro))
        batch = replace(batch, depth=batch.depth * scale)
        return train_step(self.engine.module, batch, self.step_params, torch.full((7, 32), 5.0))

    def accumulate_gradients(self, step, scale=1.0):
        """One optimiser step's backward passes; the mean loss over all ranks and the positions of this rank."""
        total, positions = torch.zeros(()), []
        for index in range(self.accumulate):
            position = ((step * self.accumulate + index) * self.world.size + self.world.rank) * self.micro
            losses = self.losses(position, scale)
            total += losses.total.detach() / self.accumulate
            self.engine.backward(losses.total)
            positions += range(position, position + self.micro)
        return (dist.all_sum(total) / self.world.size).item(), positions

    def train(self, steps, first=0):
        losses, norms, seen = [], [], []
        for step in range(first, first + steps):
            loss, positions = self.accumulate_gradients(step)
            self.engine.set_learning_rate(RATE)
            stats = self.engine.step()
            assert stats.applied
            losses.append(loss)
            norms.append(stats.grad_norm)
            seen.append(positions)
        return losses, norms, seen

    def state(self):
        """The whole training state of this rank, to compare bit by bit."""
        return {
            f"{f.name}@{f.start}.{part}": getattr(f, part).clone()
            for f in self.engine.fragments()
            for part in ("master", "exp_avg", "exp_avg_sq")
        }


def samples(wan, positions):
    """A batch in which every sample is a function of its position."""
    one = [sample(wan, position) for position in positions]
    fields = {name: getattr(one[0], name) for name in one[0].__dataclass_fields__}
    return Batch(
        **{
            name: torch.cat([getattr(s, name) for s in one]) if isinstance(value, torch.Tensor) else value
            for name, value in fields.items()
        }
    )


def sample(wan, position, frames=5, height=16, width=32):
    generator = torch.Generator().manual_seed(position)
    return replace(
        make_batch(wan, frames, height, width, 1, seed=position),
        timestep=None,
        depth=1 + torch.rand(1, frames, height, width, generator=generator),
        points=torch.randn(1, frames, 3, height, width, generator=generator),
        valid=torch.ones(1, frames, height, width, dtype=torch.bool),
        position=torch.tensor([position]),
    )
