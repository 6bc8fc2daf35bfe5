"""Cameras in and out of the network: the pose encoder and the camera head, and the time axes that they share with the heads.

Axes: B batch, T pixel frames, F latent frames (the first pixel frame alone, then groups of four), D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fw_train.batch import TEMPORAL_STRIDE, pixel_frames
from fw_train.model.layers import Fp32Linear, LayerNorm

POSE = 9  # numbers of a camera: axis (3), moment (3), s, roll, vertical field of view in radians
IDENTITY_POSE = (
    0.0,
    0.0,
    1.0,
    0.0,
    0.0,
    0.0,
    0.0,
    0.0,
    1.0,
)  # the first camera, with a field of view of about 57 degrees


class PoseEncoder(nn.Module):
    """Camera numbers [B, T, 9] to one fp32 feature per latent frame, [B, F, D].

    fp32 throughout: neighbouring cameras differ by less than bf16 resolves.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Fp32Linear(POSE, dim), nn.SiLU(), Fp32Linear(dim, dim))

    def forward(self, pose9: Tensor) -> Tensor:
        return pool_frames(self.mlp(pose9))


class PoseOutput(Fp32Linear):
    """Starts by saying that every camera is the first one."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1e-3)
        with torch.no_grad():
            self.bias.copy_(torch.tensor(IDENTITY_POSE))


class CameraHead(nn.Module):
    """The camera token and the mean token of each latent frame to camera numbers [B, T, 9], in fp32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = dim // 2
        self.norm = LayerNorm(2 * dim)
        self.per_latent = nn.Sequential(nn.Linear(2 * dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, hidden))
        self.per_frame = nn.Sequential(nn.GELU("tanh"), nn.Linear(hidden, hidden), nn.GELU("tanh"))
        self.out = PoseOutput(hidden, POSE)

    def forward(self, camera_token: Tensor, frame_tokens: Tensor) -> Tensor:
        """camera_token [B, D], frame_tokens [B, F, D]."""
        joined = torch.cat((camera_token.unsqueeze(1).expand_as(frame_tokens), frame_tokens), dim=-1)
        latent = self.per_latent(self.norm(joined))
        weights = upsampling_weights(frame_tokens.shape[1], latent.device)
        return self.out(self.per_frame((weights @ latent.float()).to(latent.dtype)))


def pool_frames(x: Tensor) -> Tensor:
    """[B, T, D] to [B, F, D]: the first frame alone, then means of four."""
    rest = x[:, 1:].unflatten(1, (-1, TEMPORAL_STRIDE)).mean(dim=2)
    return torch.cat((x[:, :1], rest), dim=1)


def upsampling_weights(latent: int, device: torch.device) -> Tensor:
    """fp32 [T, F]: linear interpolation in time between the centres of the latent frames, constant beyond the last."""
    frame = torch.arange(pixel_frames(latent), dtype=torch.float32, device=device)
    # Latent frame k > 0 stands for pixel frames 4k-3 .. 4k, whose centre is 4k - 1.5; latent frame 0 is pixel frame 0.
    centre = torch.arange(latent, dtype=torch.float32, device=device) * TEMPORAL_STRIDE - 1.5
    centre[0] = 0
    if latent == 1:
        return torch.ones(1, 1, device=device)
    left = torch.bucketize(frame, centre, right=True).clamp(1, latent - 1) - 1
    share = ((frame - centre[left]) / (centre[left + 1] - centre[left])).clamp(max=1).unsqueeze(1)
    return F.one_hot(left, latent) * (1 - share) + F.one_hot(left + 1, latent) * share
