"""From noise to latents: the flow's differential equation dx/ds = velocity(x, s), integrated down the noise levels."""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor

from fw_train.flow import euler_step

Solver = Literal["euler", "heun"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], noise level []) -> dx/ds, like x


def integrate(
    velocity: Velocity,
    noise: Tensor,
    levels: Tensor,
    solver: Solver,
    on_step: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Carries noise [B, ...] along the falling `levels` [steps + 1], of which the first is the noise's own.

    Euler asks for the velocity once a step and errs in proportion to the step; Heun asks twice, and its error falls with the
    step's square. `on_step` hears how many steps are done.
    """
    x = noise
    for done, (s_from, s_to) in enumerate(pairwise(levels), start=1):
        slope = velocity(x, s_from)
        if solver == "heun":
            slope = (slope + velocity(euler_step(x, slope, s_from, s_to), s_to)) / 2
        x = euler_step(x, slope, s_from, s_to)
        on_step(done)
    return x
