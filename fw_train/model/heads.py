"""Dense prediction heads: four taps of the geometry branch, fused from coarse to fine, to maps at full resolution.

The maps are made per latent frame, a few frames at a time, and brought to the pixel frames last.
Axes: B batch, F latent frames, T pixel frames, h x w tokens of a frame, n frames of a chunk, C channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fw_train.model.camera import upsampling_weights
from fw_train.model.layers import LayerNorm

TOKEN_PX = 16  # pixels per token along each side
POSITION_SCALE = 0.1


@dataclass(frozen=True)
class DenseHeadParams:
    dim: int
    features: int = 256
    channels: tuple[int, int, int, int] = (256, 512, 768, 768)  # of the taps, finest first
    chunk_frames: int = 3  # latent frames that are computed at once: bounds the peak memory


class ConvUnit(nn.Module):
    """Pre-activation residual pair of 3x3 convolutions."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Adds a finer level to the coarser result so far, and brings the sum to the next level's size."""

    def __init__(self, features: int, joins: bool) -> None:
        super().__init__()
        self.level = ConvUnit(features) if joins else None
        self.merge = ConvUnit(features)
        self.out = nn.Conv2d(features, features, 1)

    def forward(self, level: Tensor, coarser: Tensor | None, size: tuple[int, int]) -> Tensor:
        if self.level is not None and coarser is not None:
            level = coarser + self.level(level)
        # The 1x1 convolution commutes with the interpolation and is cheaper before it.
        return F.interpolate(self.out(self.merge(level)), size, mode="bilinear", align_corners=False)


class FrameMaps(nn.Module):
    """The convolutional part: token maps of n frames to raw outputs [n, C, 16h, 16w]."""

    def __init__(self, params: DenseHeadParams, out_channels: int) -> None:
        super().__init__()
        channels, features = params.channels, params.features
        self.norms = nn.ModuleList([LayerNorm(params.dim) for _ in channels])
        self.projects = nn.ModuleList([nn.Linear(params.dim, c) for c in channels])
        self.resizes = nn.ModuleList(
            [
                nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
                nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
            ]
        )
        self.levels = nn.ModuleList([nn.Conv2d(c, features, 3, padding=1, bias=False) for c in channels])
        self.fusions = nn.ModuleList([Fusion(features, joins=i < len(channels) - 1) for i in range(len(channels))])
        self.neck = nn.Conv2d(features, features // 2, 3, padding=1)
        self.out = nn.Sequential(nn.Conv2d(features // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, out_channels, 1))

    def forward(self, taps: list[Tensor]) -> Tensor:
        """taps: finest first, each [n, h, w, D]."""
        height, width = taps[0].shape[1:3]
        levels = []
        for tap, norm, project, resize, level in zip(
            taps, self.norms, self.projects, self.resizes, self.levels, strict=True
        ):
            tokens = project(norm(tap))
            tokens = tokens + POSITION_SCALE * image_position(height, width, tokens)
            # A permuted view of channels-last memory: the layout in which convolutions run fastest.
            levels.append(level(resize(tokens.permute(0, 3, 1, 2))))
        x = None
        for index in reversed(range(len(levels))):
            size = levels[index - 1].shape[-2:] if index else (TOKEN_PX // 2 * height, TOKEN_PX // 2 * width)
            x = self.fusions[index](levels[index], x, size)
        full = (TOKEN_PX * height, TOKEN_PX * width)
        return self.out(F.interpolate(self.neck(x), full, mode="bilinear", align_corners=False))


class DenseHead(nn.Module):
    """Taps of the geometry branch to fp32 maps [B, T, C, H, W], before the activation of each kind of map."""

    def __init__(self, params: DenseHeadParams, out_channels: int) -> None:
        super().__init__()
        self.chunk_frames = params.chunk_frames
        self.frame_maps = FrameMaps(params, out_channels)

    def forward(self, taps: list[Tensor], grid: tuple[int, int, int]) -> Tensor:
        """taps: finest first, each [B, F*h*w, D]; raw maps [B, F, C, H, W] in fp32."""
        frames, height, width = grid
        maps = [rearrange(t, "b (f h w) d -> (b f) h w d", f=frames, h=height, w=width) for t in taps]
        chunks = zip(*(m.split(self.chunk_frames) for m in maps), strict=True)
        raw = torch.cat([self.frame_maps(list(chunk)) for chunk in chunks])
        return rearrange(raw, "(b f) c h w -> b f c h w", f=frames).float()


def depth_from_raw(raw: Tensor) -> Tensor:
    """[B, F, 1, H, W] to positive depth [B, T, H, W]."""
    return to_pixel_frames(raw.exp())[:, :, 0]


def points_from_raw(raw: Tensor) -> tuple[Tensor, Tensor]:
    """[B, F, 4, H, W] to points [B, T, 3, H, W] and their confidence [B, T, H, W], which is at least 1."""
    xyz, confidence = raw.split((3, 1), dim=2)
    # Symmetric exponential growth: near things get fine steps, far things are reached with small activations.
    points = xyz.sign() * xyz.abs().expm1()
    return to_pixel_frames(points), to_pixel_frames(1 + confidence.exp())[:, :, 0]


def to_pixel_frames(maps: Tensor) -> Tensor:
    """[B, F, C, H, W] to [B, T, C, H, W] by linear interpolation in time."""
    return torch.einsum("tf,bfchw->btchw", upsampling_weights(maps.shape[1], maps.device), maps)


def image_position(height: int, width: int, like: Tensor) -> Tensor:
    """Sine and cosine code [h, w, C] of the place in the image, in units of its diagonal: what a convolution cannot know."""
    diagonal = (height**2 + width**2) ** 0.5
    v = (torch.arange(height, dtype=torch.float32, device=like.device) + 0.5 - height / 2) / diagonal
    u = (torch.arange(width, dtype=torch.float32, device=like.device) + 0.5 - width / 2) / diagonal
    quarter = like.shape[-1] // 4
    frequency = 2 * torch.pi * 100.0 ** (torch.arange(quarter, dtype=torch.float32, device=like.device) / quarter) / 2
    along_v, along_u = torch.outer(v, frequency), torch.outer(u, frequency)
    rows = torch.cat((along_v.sin(), along_v.cos()), dim=-1).unsqueeze(1).expand(-1, width, -1)
    columns = torch.cat((along_u.sin(), along_u.cos()), dim=-1).unsqueeze(0).expand(height, -1, -1)
    code = torch.cat((rows, columns), dim=-1)
    return F.pad(code, (0, like.shape[-1] - code.shape[-1])).to(like.dtype)
