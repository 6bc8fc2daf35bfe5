"""Count the parameters of each module, what trains in the configured stage, and compare with the published figures.

    fw params configs/stage1.yaml
    fw params configs/stage2.yaml train.precision=fp32

Nothing is allocated: the 14B model is counted in seconds.
"""

import argparse
from typing import NamedTuple

from torch import nn

from fw_train.arguments import add_config, read_config
from fw_train.build import on_meta, world_params
from fw_train.model.world import FantasyWorldModel
from fw_train.precision import PRECISIONS
from fw_train.stages import count_rules, match_rules, stage_rules


class Published(NamedTuple):
    millions: float
    note: str


# What the guides to this architecture state for the 1.3B camera-control model.
PUBLISHED = {
    "video": Published(1616, ""),
    "latent_bridge": Published(5, "two layers of width 1536 with a 4x feed-forward, as published, have 57 M"),
    "geo_blocks": Published(
        900, "18 copied blocks with image cross-attention and pose adapters 963 M, frame attention 170 M more"
    ),
    "heads": Published(50, "depth and point head; the camera head is beside it"),
    "pose_enc": Published(1, "its second layer alone, 1536 -> 1536, has 2.4 M"),
    "tokens": Published(0.01, ""),
    "camera_adapters": Published(30, ""),
    "irg_cross_attns": Published(200, "width 1152, six projections in each of 18 modules"),
    "trainable, stage 1": Published(
        956, "frame attention, image cross-attention and the bridge are larger than stated"
    ),
    "trainable, stage 2": Published(1186, "the same"),
}
PUBLISHED_FOR = ("camera", 1536, 30)

PARTS = {
    "video": ("video",),
    "latent_bridge": ("latent_bridge",),
    "geo_blocks": ("geo_blocks",),
    "tokens": ("token_camera", "tokens_register"),
    "pose_enc": ("pose_enc",),
    "heads": ("head_depth", "head_point"),
    "head_camera": ("head_camera",),
    "camera_adapters": ("camera_adapters",),
    "irg_cross_attns": ("irg_cross_attns",),
}


class Row(NamedTuple):
    part: str
    parameters: int
    trainable: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    config = read_config(args)
    precision = PRECISIONS[config.train.precision]
    model = on_meta(lambda: FantasyWorldModel(world_params(config)), precision.params)
    stage = config.train.stage
    m = config.model
    rules = stage_rules(stage, config.train.gate_lr_scale)
    known = (m.variant, m.dim, m.layers) == PUBLISHED_FOR
    rows = part_rows(model, stage)
    total = sum(row.parameters for row in rows)
    trainable = sum(row.trainable for row in rows)

    print(f"{m.variant}, width {m.dim}, {m.layers} blocks, {stage}, {precision.params}")
    print(f"\n{'part':<18}{'parameters':>16}{'trainable':>16}{'weights':>12}  {'published' if known else ''}")
    for row in rows:
        size = _bytes(row.parameters * precision.params.itemsize)
        note = _published(row.part, row.parameters) if known else ""
        print(f"{row.part:<18}{row.parameters:>16,}{row.trainable:>16,}{size:>12}  {note}")
    number = stage.removeprefix("stage")
    published = _published(f"trainable, stage {number}", trainable) if known and stage != "stage0" else ""
    print(f"{'total':<18}{total:>16,}{trainable:>16,}{_bytes(total * precision.params.itemsize):>12}  {published}")
    state = trainable * 3 * precision.master.itemsize
    print(
        f"\ntraining state beside the weights: {_bytes(state)} of master weights and moments, "
        f"{_bytes(trainable * precision.gradients.itemsize)} of gradients, over all ranks"
    )

    print(f"\n{'rule of ' + stage:<60}{'tensors':>8}{'parameters':>16}  state")
    for rule, tensors, parameters in count_rules(model, rules):
        state_text = (
            f"lr x{rule.lr_scale:g}, decay {'on' if rule.weight_decay else 'off'}" if rule.trainable else "frozen"
        )
        print(f"{rule.pattern:<60}{tensors:>8}{parameters:>16,}  {state_text}")
    return 0


def part_rows(model: nn.Module, stage: str) -> list[Row]:
    """Parameters of each part, and how many of them train in the stage."""
    named = dict(model.named_parameters())
    matched = match_rules(named, stage_rules(stage))
    rows = []
    for part, roots in PARTS.items():
        names = [name for name in named if name.split(".")[0] in roots]
        rows.append(
            Row(
                part,
                sum(named[name].numel() for name in names),
                sum(named[name].numel() for name in names if matched[name].trainable),
            )
        )
    return rows


def _published(part: str, parameters: int) -> str:
    published = PUBLISHED.get(part)
    if published is None:
        return ""
    text = f"{published.millions:g} M"
    differs = abs(parameters / 1e6 - published.millions) > 0.05 * published.millions
    return f"{text}  ({published.note})" if differs and published.note else text


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
