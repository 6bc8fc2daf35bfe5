"""Compare a module with stored reference activations; exit 1 where they differ.

    fw parity FIXTURE.safetensors
    fw parity FIXTURE.safetensors --tolerance 1e-5 --dtype float32

A fixture is a safetensors file with metadata `config` (JSON) and tensors `state.*` (weights), `in.*` and `out.*`.
Its configuration says what to build: `variant` a Wan video transformer, `video_dim` the cross-attention of the branches.
A tensor fails where max|a-b| > tolerance * max(1, max|b|).
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fw_train.batch import Batch
from fw_train.model.cross_attn import BiCrossAttention
from fw_train.model.rope import extend_unrotated, rope_table
from fw_train.model.wan import VARIANTS, WanDiT, WanParams

TOLERANCE = 2e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

WAN_INPUTS = {
    "latents": "latents",
    "text": "text",
    "timestep": "timestep",
    "clip_feature": "clip",
    "clip": "clip",
    "image_latents": "image_latents",
    "control_latents": "control_latents",
    "reference_latents": "reference_latents",
    "control_camera": "control_camera",
}


class Difference(NamedTuple):
    name: str
    max_abs: float
    relative: float  # to the largest reference value
    passed: bool


class Fixture(NamedTuple):
    config: dict[str, Any]
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fixture", nargs="+", metavar="FIXTURE.safetensors")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"default {TOLERANCE}")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="in which the module is built")
    parser.add_argument("--device", default="cpu")


def run(args: argparse.Namespace) -> int:
    failed = 0
    for path in args.fixture:
        differences = compare_fixture(read_fixture(path), DTYPES[args.dtype], args.device, args.tolerance)
        print(f"{path}\n  {'tensor':<24}{'max abs':>12}{'relative':>12}")
        for d in differences:
            print(f"  {d.name:<24}{d.max_abs:>12.3e}{d.relative:>12.3e}  {'ok' if d.passed else 'FAILED'}")
            failed += not d.passed
    print(f"{failed} tensors differ by more than {args.tolerance:g}" if failed else "all equal within the tolerance")
    return 1 if failed else 0


def read_fixture(path: str | Path) -> Fixture:
    if not Path(path).is_file():
        raise ValueError(f"no fixture {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); make or fetch it again") from None
    if "config" not in metadata:
        raise ValueError(f"{path} has no metadata `config`; a fixture says there, as JSON, what to build")
    groups: dict[str, dict[str, Tensor]] = {"state": {}, "in": {}, "out": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind not in groups or not name:
            raise ValueError(f"{path}: tensor `{key}` is none of state.*, in.*, out.*")
        groups[kind][name] = tensor
    if not groups["out"]:
        raise ValueError(f"{path} holds no out.* tensor: there is nothing to compare")
    return Fixture(json.loads(metadata["config"]), groups["state"], groups["in"], groups["out"])


def compare_fixture(
    fixture: Fixture, dtype: torch.dtype, device: str = "cpu", tolerance: float = TOLERANCE
) -> list[Difference]:
    """Builds and runs what the fixture describes, and compares every output."""
    if "variant" in fixture.config:
        compute: Callable[[Fixture, torch.dtype, str], Mapping[str, Tensor]] = _run_wan
    elif "video_dim" in fixture.config:
        compute = _run_cross_attention
    else:
        raise ValueError(
            f"the fixture's config has neither `variant` nor `video_dim` (it has {', '.join(fixture.config)}): "
            "nothing here knows how to build that"
        )
    try:
        with torch.no_grad():
            computed = compute(fixture, dtype, device)
    except KeyError as error:
        raise ValueError(f"the fixture lacks {error} in its config or its inputs") from None
    missing = [name for name in fixture.outputs if name not in computed]
    if missing:
        raise ValueError(f"no module gives out.{', out.'.join(missing)}; there are {', '.join(computed)}")
    return [difference(name, computed[name], b, tolerance) for name, b in fixture.outputs.items()]


def difference(name: str, a: Tensor, b: Tensor, tolerance: float) -> Difference:
    if a.shape != b.shape:
        raise ValueError(f"out.{name}: shape {tuple(b.shape)} in the fixture, {tuple(a.shape)} computed")
    a, b = a.detach().cpu().double(), b.double()
    max_abs, largest = (a - b).abs().max().item(), b.abs().max().item()
    # Written so that a NaN fails.
    return Difference(name, max_abs, max_abs / max(largest, 1e-30), max_abs <= tolerance * max(1.0, largest))


def _run_wan(fixture: Fixture, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    config = fixture.config
    if config["variant"] not in VARIANTS:
        raise ValueError(f"no Wan variant `{config['variant']}`; there are {', '.join(VARIANTS)}")
    image = fixture.state.get("img_emb.proj.0.weight")
    params = WanParams(
        variant=config["variant"],
        dim=config["dim"],
        ffn_dim=config["ffn_dim"],
        heads=config["num_heads"],
        layers=config["num_layers"],
        text_dim=config["text_dim"],
        clip_dim=1280 if image is None else image.shape[0],
        freq_dim=config["freq_dim"],
        out_dim=config["out_dim"],
        eps=config["eps"],
        reference_conv=config.get("has_ref_conv", False),
        image_position=config.get("has_image_pos_emb", False),
    )
    if config["in_dim"] != params.inputs.in_channels:
        raise ValueError(
            f"variant {params.variant} has {params.inputs.in_channels} input channels, the fixture {config['in_dim']}"
        )
    model = _load(WanDiT(params), fixture.state, dtype, device)
    unknown = [name for name in fixture.inputs if name not in WAN_INPUTS]
    if unknown:
        raise ValueError(f"unknown inputs in.{', in.'.join(unknown)}; known are {', '.join(WAN_INPUTS)}")
    missing = [f"in.{name}" for name in ("latents", "text", "timestep") if name not in fixture.inputs]
    if missing:
        raise ValueError(f"the fixture lacks {', '.join(missing)}")
    fields: dict[str, Any] = {WAN_INPUTS[name]: tensor for name, tensor in fixture.inputs.items()}
    fields["timestep"] = fields["timestep"].float()
    batch = Batch(**fields).to(device, dtype)

    stream = model.embed(batch)
    outputs = {"freqs_real": stream.rope.unsqueeze(1)}
    for index in range(params.layers):
        stream = model.run_block(index, stream)
        outputs[f"block_{index}"] = stream.tokens
    outputs["velocity"] = model.velocity(stream)
    return outputs


def _run_cross_attention(fixture: Fixture, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    config, inputs = fixture.config, fixture.inputs
    module = BiCrossAttention(config["video_dim"], config["geometry_dim"], config["hidden"], config["heads"])
    module = _load(module, fixture.state, dtype, device)
    video_rope = rope_table(tuple(config["grid"]), config["hidden"] // config["heads"], device)
    geometry_rope = extend_unrotated(video_rope, config["extra"])
    # Tables that come with the fixture are part of the check, not of the input.
    for name, table in (("freqs_video_real", video_rope), ("freqs_geometry_real", geometry_rope)):
        stored = inputs.get(name)
        if stored is not None and (table.cpu() - stored.squeeze(1)).abs().max() > 1e-5:
            raise ValueError(
                f"in.{name} is not the rotary table of grid {config['grid']} with {config['extra']} unrotated tokens"
            )
    video, geometry = module(
        inputs["video"].to(device, dtype), inputs["geometry"].to(device, dtype), video_rope, geometry_rope
    )
    return {"video": video, "geometry": geometry}


def _load(module: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype, device: str) -> Any:
    module = module.to(device, dtype)
    try:
        module.load_state_dict({key: tensor.to(device, dtype) for key, tensor in state.items()})
    except RuntimeError as error:
        raise ValueError(f"the fixture's weights do not fit its configuration: {error}") from None
    return module
