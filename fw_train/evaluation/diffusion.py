"""How well the noise is told from the video, by noise level; axes: B samples."""

from torch import Tensor

from fw_train.flow import TIMESTEPS

BINS = 10


def velocity_error(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean square error fp32 [B] of velocities [B, ...]."""
    return (velocity.float() - target).square().flatten(1).mean(1)


def bin_level(index: int) -> float:
    """The noise level in the middle of a bin."""
    return (index + 0.5) / BINS


def bin_name(index: int) -> str:
    """The bin's range of the timestep, as in t0000-0100."""
    width = TIMESTEPS // BINS
    return f"t{index * width:04}-{(index + 1) * width:04}"
