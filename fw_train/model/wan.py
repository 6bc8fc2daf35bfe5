"""The Wan2.1 video transformer with its original parameter names: text, image, control and camera-control variants.

Axes: B batch, F latent frames, h x w tokens of a frame, N = F*h*w video tokens, R reference tokens in front of them
(none, or h*w with the reference conv), D width, L text tokens.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fw_train.batch import LATENT_CHANNELS, SPATIAL_STRIDE, Batch
from fw_train.model.attention import attend
from fw_train.model.layers import Fp32Linear, LayerNorm, RMSNorm, add_gated, norm_modulate
from fw_train.model.rope import rope_table, rotate

PATCH = 2  # latent pixels per token along each side; the patch is one latent frame deep

Variant = Literal["t2v", "i2v", "inpaint", "control", "camera"]


class VariantInputs(NamedTuple):
    """What a variant takes beside latents, text and time."""

    image_channels: int = (
        0  # of `image_latents`: 16 latents of the first frame, with 4 mask channels in front where it is 20
    )
    control_latents: bool = False
    clip: bool = True
    camera_channels: int = 0  # of `control_camera`

    @property
    def in_channels(self) -> int:
        return LATENT_CHANNELS * (1 + self.control_latents) + self.image_channels


VARIANTS: dict[str, VariantInputs] = {
    "t2v": VariantInputs(clip=False),
    "i2v": VariantInputs(image_channels=20),
    "inpaint": VariantInputs(image_channels=20),
    "control": VariantInputs(image_channels=16, control_latents=True),
    "camera": VariantInputs(image_channels=16, camera_channels=24),
}


@dataclass(frozen=True)
class WanParams:
    variant: Variant
    dim: int
    ffn_dim: int
    heads: int
    layers: int
    text_dim: int = 4096
    clip_dim: int = 1280
    freq_dim: int = 256
    out_dim: int = LATENT_CHANNELS
    eps: float = 1e-6
    reference_conv: bool = False  # the V1.1 control models put a reference image in front of the video
    image_position: bool = False  # the first-and-last-frame model tells its two CLIP images apart

    @property
    def inputs(self) -> VariantInputs:
        return VARIANTS[self.variant]

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


class AttentionWeights(nn.Module):
    """What attention to the video and attention to the text have in common: projections, and norms of queries and keys."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)


class SelfAttention(AttentionWeights):
    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """x [B, L, D], rope [L, D/heads/2, 2]."""
        q = rotate(split_heads(self.norm_q(self.q(x)), self.heads), rope).to(x.dtype)
        k = rotate(split_heads(self.norm_k(self.k(x)), self.heads), rope).to(x.dtype)
        return self.o(attend(q, k, split_heads(self.v(x), self.heads)).flatten(2))


class CrossAttention(AttentionWeights):
    """Attention to the text, plus attention of the same queries to the CLIP image tokens where the variant has them."""

    def __init__(self, dim: int, heads: int, eps: float, image: bool) -> None:
        super().__init__(dim, heads, eps)
        if image:
            self.k_img = nn.Linear(dim, dim)
            self.v_img = nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
        """x [B, L, D], text [B, S, D], image [B, 257, D] or None."""
        q = split_heads(self.norm_q(self.q(x)).to(x.dtype), self.heads)
        k = split_heads(self.norm_k(self.k(text)).to(x.dtype), self.heads)
        out = attend(q, k, split_heads(self.v(text), self.heads)).flatten(2)
        if image is not None:
            k = split_heads(self.norm_k_img(self.k_img(image)).to(x.dtype), self.heads)
            out = out + attend(q, k, split_heads(self.v_img(image), self.heads)).flatten(2)
        return self.o(out)


class WanBlock(nn.Module):
    def __init__(self, params: WanParams) -> None:
        super().__init__()
        dim, eps = params.dim, params.eps
        self.eps = eps
        self.self_attn = SelfAttention(dim, params.heads, eps)
        self.cross_attn = CrossAttention(dim, params.heads, eps, params.inputs.clip)
        self.norm3 = LayerNorm(dim, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, params.ffn_dim), nn.GELU("tanh"), nn.Linear(params.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.modulation, std=self.modulation.shape[-1] ** -0.5)

    def forward(self, x: Tensor, text: Tensor, image: Tensor | None, time: Tensor, rope: Tensor) -> Tensor:
        """x [B, L, D], text and image the embedded contexts, time fp32 [B, 6, D], rope [L, D/heads/2, 2]."""
        modulation = self.time_modulation(time)
        x = self.attend_self(x, modulation, rope)
        return self.attend_context(x, modulation, text, image)

    def time_modulation(self, time: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the self-attention, then of the feed-forward; each fp32 [B, 1, D]."""
        if time.dtype != torch.float32:  # an engine that casts inputs would do this silently
            raise TypeError(f"the time modulation must be float32, got {time.dtype}")
        return (self.modulation.float() + time).chunk(6, dim=1)

    def attend_self(self, x: Tensor, modulation: tuple[Tensor, ...], rope: Tensor) -> Tensor:
        shift, scale, gate = modulation[:3]
        return add_gated(x, gate, self.self_attn(norm_modulate(x, shift, scale, self.eps), rope))

    def attend_context(self, x: Tensor, modulation: tuple[Tensor, ...], text: Tensor, image: Tensor | None) -> Tensor:
        """Text (and image) cross-attention, then the feed-forward."""
        shift, scale, gate = modulation[3:]
        x = x + self.cross_attn(self.norm3(x), text, image)
        return add_gated(x, gate, self.ffn(norm_modulate(x, shift, scale, self.eps)))


class ImageEmbedding(nn.Module):
    """CLIP tokens to context tokens."""

    def __init__(self, clip_dim: int, dim: int, position: bool) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm(clip_dim), nn.Linear(clip_dim, clip_dim), nn.GELU(), nn.Linear(clip_dim, dim), LayerNorm(dim)
        )
        self.emb_pos = nn.Parameter(torch.empty(1, 514, clip_dim)) if position else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.emb_pos is not None:
            nn.init.zeros_(self.emb_pos)

    def forward(self, clip: Tensor) -> Tensor:
        return self.proj(clip if self.emb_pos is None else clip + self.emb_pos)


class ResidualConv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class ControlAdapter(nn.Module):
    """Packed Plucker maps [B, 24, F, H, W] to one feature per video token, [B, D, F, h, w]."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels * 64, dim, PATCH, stride=PATCH)
        self.residual_blocks = nn.Sequential(ResidualConv(dim))

    def forward(self, maps: Tensor) -> Tensor:
        batch = maps.shape[0]
        frames = F.pixel_unshuffle(rearrange(maps, "b c f h w -> (b f) c h w"), 8)
        return rearrange(self.residual_blocks(self.conv(frames)), "(b f) d h w -> b d f h w", b=batch)


class Head(nn.Module):
    def __init__(self, params: WanParams) -> None:
        super().__init__()
        self.eps = params.eps
        self.head = nn.Linear(params.dim, params.out_dim * PATCH * PATCH)
        self.modulation = nn.Parameter(torch.empty(1, 2, params.dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.modulation, std=self.modulation.shape[-1] ** -0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, L, D], time fp32 [B, D]."""
        shift, scale = (self.modulation.float() + time.unsqueeze(1)).chunk(2, dim=1)
        return self.head(norm_modulate(x, shift, scale, self.eps))


class VideoStream(NamedTuple):
    """The video tokens on their way through the blocks, with all that the blocks take beside them."""

    tokens: Tensor  # [B, R+N, D]
    text: Tensor  # [B, L, D]
    image: Tensor | None  # [B, 257, D]
    time: Tensor  # fp32 [B, D]
    modulation: Tensor  # fp32 [B, 6, D]
    rope: Tensor  # fp32 [R+N, head_dim/2, 2]
    grid: tuple[int, int, int]  # F, h, w of the video
    reference: int  # R

    @property
    def video(self) -> Tensor:
        """The tokens [B, N, D] without those of the reference image."""
        return self.tokens[:, self.reference :]

    def with_video(self, video: Tensor) -> Self:
        """The same stream with other video tokens; reference tokens stay."""
        tokens = torch.cat((self.tokens[:, : self.reference], video), dim=1) if self.reference else video
        return self._replace(tokens=tokens)


class WanDiT(nn.Module):
    def __init__(self, params: WanParams) -> None:
        super().__init__()
        self.params = params
        dim, inputs = params.dim, params.inputs
        patch = (1, PATCH, PATCH)
        self.patch_embedding = nn.Conv3d(inputs.in_channels, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(nn.Linear(params.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(Fp32Linear(params.freq_dim, dim), nn.SiLU(), Fp32Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Fp32Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList([WanBlock(params) for _ in range(params.layers)])
        self.head = Head(params)
        if inputs.clip:
            self.img_emb = ImageEmbedding(params.clip_dim, dim, params.image_position)
        if params.reference_conv:
            self.ref_conv = nn.Conv2d(LATENT_CHANNELS, dim, PATCH, stride=PATCH)
        if inputs.camera_channels:
            self.control_adapter = ControlAdapter(inputs.camera_channels, dim)

    def forward(self, batch: Batch) -> Tensor:
        """The velocity [B, 16, F, H/8, W/8] of a batch of noisy latents."""
        stream = self.embed(batch)
        for index in range(len(self.blocks)):
            stream = self.run_block(index, stream)
        return self.velocity(stream)

    def run_block(self, index: int, stream: VideoStream) -> VideoStream:
        block = self.blocks[index]
        return stream._replace(tokens=block(stream.tokens, stream.text, stream.image, stream.modulation, stream.rope))

    def embed(self, batch: Batch) -> VideoStream:
        """Tokens and contexts of a batch; an input that the variant lacks is an error that names it."""
        params, inputs = self.params, self.params.inputs
        rows, columns = batch.latents.shape[-2:]
        if rows % PATCH or columns % PATCH:  # the patch convolution would drop the last row or column without a word
            raise ValueError(
                f"latents of {rows}x{columns} cannot be cut into patches of {PATCH}x{PATCH}; use videos whose height and width "
                f"are divisible by {SPATIAL_STRIDE * PATCH}"
            )
        self._check_sizes(batch)
        channels = [batch.latents]
        if inputs.control_latents:
            channels.append(self._required("control_latents", batch.control_latents))
        if inputs.image_channels:
            channels.append(self._required("image_latents", batch.image_latents, inputs.image_channels))
        tokens = self.patch_embedding(torch.cat(channels, dim=1))
        if inputs.camera_channels:
            maps = self._required("control_camera", batch.control_camera, inputs.camera_channels)
            tokens = tokens + self.control_adapter(maps)
        frames, height, width = tokens.shape[2:]
        tokens = rearrange(tokens, "b d f h w -> b (f h w) d")

        reference = 0
        if params.reference_conv:
            image_tokens = self.ref_conv(self._required("reference_latents", batch.reference_latents))
            tokens = torch.cat((rearrange(image_tokens, "b d h w -> b (h w) d"), tokens), dim=1)
            reference = height * width

        time = self.time_embedding(sinusoidal(self._required("timestep", batch.timestep), params.freq_dim))
        image = None
        if inputs.clip:
            image = self.img_emb(self._required("clip", batch.clip))
        rotary_frames = frames + (1 if reference else 0)
        return VideoStream(
            tokens=tokens,
            text=self.text_embedding(batch.text),
            image=image,
            time=time,
            modulation=self.time_projection(time).unflatten(1, (6, -1)),
            rope=rope_table((rotary_frames, height, width), params.head_dim, tokens.device),
            grid=(frames, height, width),
            reference=reference,
        )

    def velocity(self, stream: VideoStream) -> Tensor:
        """The head: tokens to fp32 latents [B, 16, F, H/8, W/8]."""
        frames, height, width = stream.grid
        patches = self.head(stream.video, stream.time)
        return rearrange(
            patches,
            "b (f h w) (p q c) -> b c f (h p) (w q)",
            f=frames, h=height, w=width, p=PATCH, q=PATCH,
        ).float()  # fmt: skip

    def _check_sizes(self, batch: Batch) -> None:
        """Sizes that PyTorch would stretch to fit without a word."""
        size, _, frames, rows, columns = batch.latents.shape
        for name in (
            "text",
            "timestep",
            "clip",
            "image_latents",
            "control_latents",
            "reference_latents",
            "control_camera",
        ):
            value = getattr(batch, name)
            if value is not None and value.shape[0] != size:
                raise ValueError(f"`{name}` has {value.shape[0]} samples, the latents have {size}")
        maps, wanted = batch.control_camera, (frames, rows * SPATIAL_STRIDE, columns * SPATIAL_STRIDE)
        if maps is not None and tuple(maps.shape[2:]) != wanted:
            raise ValueError(
                f"`control_camera` is {tuple(maps.shape[2:])} in frames, height and width; the latents need {wanted}"
            )

    def _required(self, name: str, value: Tensor | None, channels: int | None = None) -> Tensor:
        if value is None:
            raise ValueError(f"the Wan variant '{self.params.variant}' needs `{name}` in the batch, and it is missing")
        if channels is not None and value.shape[1] != channels:
            raise ValueError(
                f"the Wan variant '{self.params.variant}' needs {channels} channels of `{name}`, got {value.shape[1]}"
            )
        return value


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, D] to [B, L, heads, D/heads]."""
    return x.unflatten(2, (heads, -1))


def sinusoidal(timestep: Tensor, width: int) -> Tensor:
    """fp32 [B, width] embedding of timesteps [B], which must come in fp32: bf16 holds only a third of a thousand steps."""
    if timestep.dtype != torch.float32:
        raise TypeError(f"timesteps must be float32, got {timestep.dtype}")
    half = width // 2
    frequency = 10_000 ** -(torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = torch.outer(timestep.double(), frequency)
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()
