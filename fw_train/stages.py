"""Which parameter trains in which stage: ordered rules, first match wins.

Every parameter must match a rule and every rule a parameter, so that a renamed module can neither train nor freeze unnoticed.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

log = logging.getLogger(__name__)

STAGES = ("stage0", "stage1", "stage2")


class Rule(NamedTuple):
    pattern: str  # matched against the whole parameter name
    trainable: bool
    lr_scale: float = 1.0
    weight_decay: bool = True


class RuleCount(NamedTuple):
    rule: Rule
    tensors: int
    parameters: int


class ParameterGroup(NamedTuple):
    """Trainable parameters that share a learning rate and a decay; `name` identifies the group across restarts."""

    name: str
    lr_scale: float
    weight_decay: bool
    parameters: dict[str, nn.Parameter]


FRAME_GATES = r"geo_blocks\.\d+\.frame_attn\.gate"
CROSS_GATES = r"irg_cross_attns\.\d+\.gamma_m[12]"


def stage_rules(stage: str, gate_lr_scale: float = 1.0) -> tuple[Rule, ...]:
    """The rules of a stage. Gates start at zero and have no decay, which would hold them there."""
    if stage == "stage0":
        return (
            Rule(r"video\.(blocks\.\d+|head)\.modulation", trainable=True, weight_decay=False),
            Rule(r"video\..*", trainable=True),
            Rule(r".*", trainable=False),
        )
    tokens = Rule(r"token_camera|tokens_register", trainable=True, weight_decay=False)
    learns = r"latent_bridge\..*|geo_blocks\..*|pose_enc\..*|head_(depth|point|camera)\..*"
    if stage == "stage1":
        return (
            Rule(r"video\..*", trainable=False),
            Rule(r"camera_adapters\..*", trainable=False),
            Rule(r"irg_cross_attns\..*", trainable=False),
            Rule(FRAME_GATES, trainable=True, lr_scale=gate_lr_scale, weight_decay=False),
            tokens,
            Rule(learns, trainable=True),
        )
    if stage == "stage2":
        return (
            Rule(r"video\..*", trainable=False),
            Rule(FRAME_GATES, trainable=True, lr_scale=gate_lr_scale, weight_decay=False),
            Rule(CROSS_GATES, trainable=True, lr_scale=gate_lr_scale, weight_decay=False),
            tokens,
            Rule(learns, trainable=True),
            Rule(r"camera_adapters\..*", trainable=True),
            Rule(r"irg_cross_attns\..*", trainable=True),
        )
    raise ValueError(f"no stage `{stage}`; there are {', '.join(STAGES)}")


def match_rules(names: Iterable[str], rules: Sequence[Rule]) -> dict[str, Rule]:
    """The rule of each parameter name; a name without a rule or a rule without a name is an error that lists them."""
    compiled = [(rule, re.compile(rule.pattern)) for rule in rules]
    matched: dict[str, Rule] = {}
    orphans = []
    for name in names:
        rule = next((rule for rule, regex in compiled if regex.fullmatch(name)), None)
        if rule is None:
            orphans.append(name)
        else:
            matched[name] = rule
    if orphans:
        raise ValueError(
            f"{len(orphans)} parameters match no stage rule: {', '.join(orphans[:10])}; add a rule for them"
        )
    used = set(matched.values())
    idle = [rule.pattern for rule in rules if rule not in used]
    if idle:
        raise ValueError(f"stage rules that match no parameter (any more): {', '.join(idle)}; correct or remove them")
    return matched


def apply_stage(model: nn.Module, rules: Sequence[Rule]) -> list[ParameterGroup]:
    """Sets `requires_grad` by the rules, logs the count of each, and returns the trainable parameters as optimiser groups."""
    matched = match_rules((name for name, _ in model.named_parameters()), rules)
    groups: dict[Rule, ParameterGroup] = {}
    for name, parameter in model.named_parameters():
        rule = matched[name]
        parameter.requires_grad_(rule.trainable)
        if rule.trainable:
            group = groups.setdefault(rule, ParameterGroup(rule.pattern, rule.lr_scale, rule.weight_decay, {}))
            group.parameters[name] = parameter
    for rule, tensors, parameters in count_rules(model, rules):
        state = (
            f"train, lr x{rule.lr_scale:g}, decay {'on' if rule.weight_decay else 'off'}"
            if rule.trainable
            else "frozen"
        )
        log.info("%-70s %5d tensors %14s parameters  %s", rule.pattern, tensors, f"{parameters:,}", state)
    return list(groups.values())


def count_rules(model: nn.Module, rules: Sequence[Rule]) -> list[RuleCount]:
    """How many tensors and parameters each rule takes, in the order of the rules."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    matched = match_rules(sizes, rules)
    taken = {rule: [sizes[name] for name, r in matched.items() if r is rule] for rule in rules}
    return [RuleCount(rule, len(sizes_of), sum(sizes_of)) for rule, sizes_of in taken.items()]


def gate_magnitudes(model: nn.Module) -> dict[str, float]:
    """The mean size of every zero-initialised gate: how far the branches have opened to each other.

    Where the engine has sharded the parameters, all ranks must call it together.
    """
    gates = {
        name: p.detach() for name, p in model.named_parameters() if re.fullmatch(f"{FRAME_GATES}|{CROSS_GATES}", name)
    }
    if not gates:
        return {}
    whole = [gate.full_tensor() if isinstance(gate, DTensor) else gate for gate in gates.values()]
    means = torch.stack([gate.float().abs().mean() for gate in whole])
    return dict(zip(gates, means.tolist(), strict=True))
