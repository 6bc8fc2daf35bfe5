"""The gradient's norm by module group: what share of the whole norm the video, the bridge or a head has."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

TOKENS = ("token_camera", "tokens_register")  # parameters of the network itself, told apart by nobody


def group_of(parameter: str) -> str:
    """The module group of a parameter: the first component of its name."""
    first = parameter.partition(".")[0]
    return "tokens" if first in TOKENS else first


def norms_by_group(
    names: Iterable[str], norms: Iterable[tuple[str, Tensor]], sum_over_ranks: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """From names of all trainable parameters and the norms [] of this rank's pieces of their gradients."""
    pieces = list(norms)
    squares = defaultdict[str, float](float)
    if pieces:
        for (name, _), norm in zip(pieces, torch.stack([norm for _, norm in pieces]).tolist(), strict=True):
            squares[group_of(name)] += norm * norm
    groups = sorted({group_of(name) for name in names})  # the same on all ranks, whatever each of them owns
    total = sum_over_ranks(torch.tensor([squares[group] for group in groups], dtype=torch.float64))
    return dict(zip(groups, total.sqrt().tolist(), strict=True))
