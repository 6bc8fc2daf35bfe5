"""FantasyWorld: a video transformer and a geometry branch that splits off after its first blocks.

    latents -> embed -> blocks 0..S-1 --+--> blocks S.. ------------> head -> velocity
                                        |     ^ v  cross-attention after each pair (when the branches interact)
                                        +--> latent bridge -> geometry blocks -> depth, points, cameras

Axes: B batch, T pixel frames, F latent frames, N = F*h*w video tokens, E special tokens behind them, D width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fw_train.batch import Batch, Prediction
from fw_train.model.bridge import LatentBridge
from fw_train.model.camera import CameraHead, PoseEncoder
from fw_train.model.cross_attn import BiCrossAttention
from fw_train.model.geo_block import GeoBlock, add_per_frame
from fw_train.model.heads import DenseHead, DenseHeadParams, depth_from_raw, points_from_raw
from fw_train.model.layers import ZeroLinear
from fw_train.model.rope import extend_unrotated, rope_table
from fw_train.model.wan import VideoStream, WanDiT, WanParams


@dataclass(frozen=True)
class WorldParams:
    wan: WanParams
    head: DenseHeadParams
    interaction: bool  # the camera adapters and the cross-attention take part (stage 2)
    split_layer: int = 12  # blocks before the branches part
    bridge_heads: int = 8
    bridge_layers: int = 2
    register_tokens: int = 4
    cross_width: int = 1152
    cross_heads: int = 12
    taps: tuple[int, int, int, int] = (5, 8, 11, 17)  # geometry blocks that the dense heads read, coarsest first

    @property
    def pairs(self) -> int:
        return self.wan.layers - self.split_layer


class Pose(NamedTuple):
    """What the camera adds to the tokens: one feature per latent frame, and which samples it is open for."""

    feature: Tensor  # [B, F, D]
    on: Tensor  # [B, 1, 1], 0 or 1


class ShardUnit(NamedTuple):
    """A part that is wrapped, checkpointed and compiled as one."""

    name: str
    module: nn.Module


class FantasyWorldModel(nn.Module):
    def __init__(self, params: WorldParams) -> None:
        super().__init__()
        self.params = params
        dim, pairs = params.wan.dim, params.pairs
        self.video = WanDiT(params.wan)
        self.latent_bridge = LatentBridge(dim, params.bridge_heads, params.bridge_layers)
        self.geo_blocks = nn.ModuleList([GeoBlock(params.wan) for _ in range(pairs)])
        self.token_camera = nn.Parameter(torch.empty(1, 1, dim))
        self.tokens_register = nn.Parameter(torch.empty(1, params.register_tokens, dim))
        self.pose_enc = PoseEncoder(dim)
        self.head_depth = DenseHead(params.head, 1)
        self.head_point = DenseHead(params.head, 4)
        self.head_camera = CameraHead(dim)
        self.camera_adapters = nn.ModuleList(
            [nn.Sequential(nn.SiLU(), ZeroLinear(dim, dim)) for _ in range(params.split_layer)]
        )
        self.irg_cross_attns = nn.ModuleList(
            [BiCrossAttention(dim, dim, params.cross_width, params.cross_heads) for _ in range(pairs)]
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.token_camera, std=0.02)
        nn.init.normal_(self.tokens_register, std=0.02)

    def forward(self, batch: Batch, *, velocity: bool = True, geometry: bool = True) -> Prediction:
        """Noisy latents and conditions to what is asked for; without interaction neither branch costs the other anything."""
        if not (geometry or velocity):
            raise ValueError("neither velocity nor geometry is asked for")
        self._check(batch)
        if not (geometry or self.params.interaction):
            return Prediction(self.video(batch), None, None, None, None)
        pose = self._pose(batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._prefix_learns(batch)):
            stream = self._run_prefix(self.video.embed(batch), pose)
        return self._run_branches(stream, pose, velocity, geometry)

    def shard_units(self) -> list[ShardUnit]:
        """The heavy parts, branch by branch; what is not in them stays with the root.

        For engines: inputs must not be cast on the way in (rotary tables and time modulation are fp32), and `video` itself is
        never called as a module, so it is no unit.
        """
        lists = {
            "video.blocks": self.video.blocks,
            "latent_bridge.layers": self.latent_bridge.layers,
            "geo_blocks": self.geo_blocks,
            "irg_cross_attns": self.irg_cross_attns,
        }
        units = [ShardUnit(f"{name}.{i}", module) for name, ms in lists.items() for i, module in enumerate(ms)]
        units.append(ShardUnit("head_depth.frame_maps", self.head_depth.frame_maps))
        units.append(ShardUnit("head_point.frame_maps", self.head_point.frame_maps))
        return units

    def _prefix_learns(self, batch: Batch) -> bool:
        """Whether anything that trains is at or before the split: if not, the first blocks run without autograd."""
        return (
            self.params.interaction
            or batch.latents.requires_grad
            or any(parameter.requires_grad for parameter in self.video.parameters())
        )

    def _check(self, batch: Batch) -> None:
        """Sizes that PyTorch would stretch to fit without a word."""
        size = batch.latents.shape[0]
        for name in ("pose9", "camera_on"):
            value = getattr(batch, name)
            if value is not None and value.shape[0] != size:
                raise ValueError(f"`{name}` has {value.shape[0]} samples, the latents have {size}")

    def _pose(self, batch: Batch) -> Pose:
        dtype, (size, _, frames) = self.token_camera.dtype, batch.latents.shape[:3]
        if batch.pose9 is None:
            feature = self.token_camera.new_zeros(size, frames, self.params.wan.dim)
            return Pose(feature, feature.new_zeros(size, 1, 1))
        if batch.pose9.shape[1] != batch.pixel_frames:
            raise ValueError(f"pose9 has {batch.pose9.shape[1]} frames, the latents stand for {batch.pixel_frames}")
        feature = self.pose_enc(batch.pose9).to(dtype)
        on = feature.new_ones(size) if batch.camera_on is None else batch.camera_on.to(dtype)
        on = on[:, None, None]
        # Multiplying would let a NaN of a dropped camera through.
        return Pose(torch.where(on > 0, feature, 0), on)

    def _run_prefix(self, stream: VideoStream, pose: Pose) -> VideoStream:
        """The blocks before the split; with interaction the camera shifts the video tokens in front of each."""
        for index in range(self.params.split_layer):
            if self.params.interaction:
                shift = self.camera_adapters[index](pose.feature) * pose.on
                stream = stream.with_video(add_per_frame(stream.video, shift))
            stream = self.video.run_block(index, stream)
        return stream

    def _run_suffix(self, stream: VideoStream) -> Tensor:
        for index in range(self.params.split_layer, self.params.wan.layers):
            stream = self.video.run_block(index, stream)
        return self.video.velocity(stream)

    def _run_branches(self, stream: VideoStream, pose: Pose, velocity: bool, geometry: bool) -> Prediction:
        params, grid = self.params, stream.grid
        frames, per_frame = grid[0], grid[1] * grid[2]
        special = 1 + params.register_tokens

        # All tables are made here, once; every block gets them as arguments, checkpointed or not.
        geometry_rope = extend_unrotated(stream.rope[stream.reference :], special)
        frame_rope = stream.rope[:per_frame]
        cross_rope = rope_table(grid, params.cross_width // params.cross_heads, stream.tokens.device)
        cross_rope_geometry = extend_unrotated(cross_rope, special)

        tokens = self.latent_bridge(stream.video)
        specials = torch.cat((self.token_camera, self.tokens_register), dim=1).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat((tokens, specials), dim=1)
        taps: list[Tensor] = []
        for pair, block in enumerate(self.geo_blocks):
            tokens = block(
                tokens, stream.text, stream.image, stream.modulation, geometry_rope, frame_rope, pose.feature, pose.on
            )
            if params.interaction:
                stream = self.video.run_block(params.split_layer + pair, stream)
                video, tokens = self.irg_cross_attns[pair](stream.video, tokens, cross_rope, cross_rope_geometry)
                stream = stream.with_video(video)
            if pair in params.taps:
                taps.insert(0, tokens[:, : frames * per_frame])

        predicted_velocity = None
        if velocity:
            predicted_velocity = self.video.velocity(stream) if params.interaction else self._run_suffix(stream)
        if not geometry:  # the branch steered the video, its heads are not wanted
            return Prediction(predicted_velocity, None, None, None, None)
        points, confidence = points_from_raw(self.head_point(taps, grid))
        frame_tokens = taps[0].unflatten(1, (frames, per_frame)).mean(dim=2)
        return Prediction(
            velocity=predicted_velocity,
            depth=depth_from_raw(self.head_depth(taps, grid)),
            points=points,
            confidence=confidence,
            cameras=self.head_camera(tokens[:, frames * per_frame], frame_tokens),
        )
