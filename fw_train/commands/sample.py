"""Generate a clip with its depth, points and cameras, along a camera path if you like.

    fw sample outputs/stage2/step-10000.safetensors --output outputs/clip --prompt "a harbour at dawn" --orbit 30
    fw sample outputs/demo/stage2/step-150.safetensors --output clip --prompt "A red box on a tiled floor" --pan -20
    fw sample CHECKPOINT --output clip --text clip.text.safetensors --camera path.txt --image first.png --sampler heun

The configuration is found beside the checkpoint (--config FILE otherwise); `section.key=value` changes it. Latents and text go
through the encoders that the run's data were made with: `dct` and `hash:D` are found by themselves, those of a Wan model lie in
its folder (--model DIR, or weights.base where that is a folder). Lengths are in scene scales: the mean distance of what is seen
to the first camera. Positive angles and distances go right and forward. The files: docs/sampling.md.
"""

import argparse
import logging
import math
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fw_train.batch import Prediction
from fw_train.build import world_params
from fw_train.config import Config
from fw_train.evaluation.validation import JUDGED_LEVEL
from fw_train.inference import config_of, load_trained
from fw_train.precision import PRECISIONS
from fw_train.sampling.conditions import Shape, check_camera, check_image, conditions, padded_text, read_first_frame
from fw_train.sampling.contact_sheet import contact_sheet
from fw_train.sampling.encoders import EncoderChoice, RunEncoders, cached_text
from fw_train.sampling.generate import SamplerParams, decoded_frames, generate, predict_geometry
from fw_train.sampling.guidance import Guidance
from fw_train.sampling.outputs import Clip, new_folder, write_clip
from fw_train.sampling.ply import chosen_points
from fw_train.sampling.sampler import SOLVERS
from fw_train.sampling.trajectories import (
    MOTIONS,
    Motion,
    Trajectory,
    decoded_trajectory,
    distance_between,
    generated_trajectory,
    read_trajectory,
    relative_path,
    square_pixels,
)
from fw_train.weights.stage import VIDEO_STAGE, StageInfo, read_stage_info

log = logging.getLogger(__name__)

REPORT_S = 5


class Texts(NamedTuple):
    """Embeddings [L, D], padded as in training."""

    wanted: Tensor
    empty: Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="step-N.safetensors of stage 2 or 1")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="changes to the run's configuration")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder for the files")
    parser.add_argument("--config", metavar="FILE", type=Path, help="configuration (default: beside the checkpoint)")
    parser.add_argument("--device", help="default: the GPU, or the processor where there is none")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), help="of the network (default: as trained)")

    shown = parser.add_argument_group("what is shown")
    text = shown.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT", help="(default: the empty prompt)")
    text.add_argument("--text", metavar="FILE", type=Path, help="a cached embedding, text.safetensors")
    shown.add_argument("--image", metavar="PNG", type=Path, help="first frame, for variants that take one")
    shown.add_argument("--frames", type=int, metavar="T", help="4k + 1 (default: as trained)")
    shown.add_argument("--size", type=parse_size, metavar="HxW", help="height x width (default: as trained)")
    shown.add_argument("--fps", type=Fraction, default=Fraction(16), help="of the videos (default: 16)")

    camera = parser.add_argument_group("camera (default: the network chooses)")
    path = camera.add_mutually_exclusive_group()
    path.add_argument("--camera", metavar="FILE", type=Path, help="a row of 19 or 12 numbers for every frame")
    path.add_argument("--orbit", type=float, metavar="DEG", help="around what lies --focus ahead; to the right")
    path.add_argument("--dolly", type=float, metavar="X", help="forward, in scene scales")
    path.add_argument("--pan", type=float, metavar="DEG", help="turn to the right on the spot")
    camera.add_argument(
        "--focus", type=float, default=1.0, metavar="X", help="distance of an orbit's centre (default: 1)"
    )
    camera.add_argument("--fov", type=float, default=45.0, metavar="DEG", help="vertical field of view (default: 45)")
    camera.add_argument(
        "--scene-scale", type=float, default=1.0, metavar="X", help="of --camera: units of a scene scale (default: 1)"
    )
    camera.add_argument(
        "--camera-size",
        type=parse_size,
        metavar="HxW",
        help="of --camera: frames that its fractions refer to, 720x1280 for RealEstate10K (default: the clip's)",
    )

    sampler = parser.add_argument_group("sampler")
    sampler.add_argument("--steps", type=int, default=30, metavar="N", help="(default: 30)")
    sampler.add_argument("--sampler", choices=SOLVERS, default="euler", help="heun runs the network twice a step")
    sampler.add_argument("--shift", type=float, help="of the noise levels (default: as trained; Wan's is 5)")
    sampler.add_argument(
        "--guidance", type=float, default=5.0, metavar="G", help="towards the text; 1: none (default: 5)"
    )
    sampler.add_argument(
        "--camera-guidance", type=float, default=1.0, metavar="G", help="towards the camera (default: 1)"
    )
    sampler.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")

    geometry = parser.add_argument_group("geometry")
    geometry.add_argument(
        "--show-camera", action="store_true", help="let the geometry branch see the path (default: it has to find it)"
    )
    geometry.add_argument("--level", type=float, default=JUDGED_LEVEL, help="noise under it (default: 0.1, as judged)")
    geometry.add_argument(
        "--points", type=int, default=200_000, metavar="N", help="most of points.ply (default: 200000)"
    )
    geometry.add_argument(
        "--unsure", type=float, default=0.3, metavar="SHARE", help="share of points left away (default: 0.3)"
    )

    encoders = parser.add_argument_group("encoders (default: those of the run's data)")
    encoders.add_argument("--model", metavar="DIR", type=Path, help="Wan folder with VAE, text and image encoder")
    encoders.add_argument("--codec", metavar="NAME", help="latents without weights: dct")
    encoders.add_argument("--text-encoder", metavar="NAME", help="text without weights: hash:D")
    encoders.add_argument("--data", metavar="DIR", type=Path, help="a packed dataset of the run")


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    check_numbers(args)
    info = read_stage_info(args.checkpoint)
    if info.stage == VIDEO_STAGE:
        raise ValueError(
            f"{args.checkpoint} holds the weights of stage 0, the video branch alone, which has no geometry; sample a "
            "checkpoint of stage 1 or 2"
        )
    config = config_of(args.checkpoint, info, args.config, args.overrides)
    wan = world_params(config).wan
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    frames = config.data.frames if args.frames is None else args.frames
    shape = Shape(frames, *(args.size or config.data.sizes_px[0]))

    # Whatever can be wrong with the inputs is found before the network is read, and one encoder is in memory at a time.
    shape.check()
    check_image(wan, args.image)
    trajectory = wanted_trajectory(args, shape)
    if trajectory is not None:
        check_camera(wan, info.stage)
    image = read_first_frame(args.image, shape) if args.image else None
    encoders = RunEncoders(config, EncoderChoice(args.model, args.codec, args.text_encoder, args.data), device)
    texts = read_texts(args, config, encoders)
    codec = encoders.latents()
    batch = conditions(wan, shape, texts.wanted, image, trajectory, codec, encoders).to(device)
    params = sampler_params(args, config, trajectory)
    with new_folder(args.output) as folder:
        trained = load_trained(args.checkpoint, args.config, args.overrides, device, args.precision)
        dtype = PRECISIONS[args.precision or config.train.precision].compute
        generated = generate(trained.model, batch, texts.empty, params, dtype, report_steps(params))
        prediction = predict_geometry(trained.model, batch, generated, args.level, dtype, camera=args.show_camera)
        pictures = decoded_frames(codec, generated.latents)
        record = describe(args, info, shape, params)
        write_clip(folder, assemble(args, pictures, prediction, trajectory, record))
    log.info(
        f"{args.output}: {shape.frames} frames of {shape.height}x{shape.width} in {time.monotonic() - started:.1f} s"
    )
    return 0


def wanted_trajectory(args: argparse.Namespace, shape: Shape) -> Trajectory | None:
    """The path that the options name, if any."""
    intrinsics = square_pixels(torch.tensor(math.radians(args.fov), dtype=torch.float64), shape.size_px)
    if args.camera is not None:
        return read_trajectory(args.camera, shape.frames, shape.size_px, args.scene_scale, args.camera_size, intrinsics)
    asked = asked_motion(args)
    if asked is None:
        return None
    motion, amount = asked
    amount = amount if motion == "dolly" else math.radians(amount)
    return generated_trajectory(motion, amount, shape.frames, args.focus, intrinsics)


def asked_motion(args: argparse.Namespace) -> tuple[Motion, float] | None:
    """The motion that is generated, in degrees or scene scales."""
    return next(((motion, getattr(args, motion)) for motion in MOTIONS if getattr(args, motion) is not None), None)


def read_texts(args: argparse.Namespace, config: Config, encoders: RunEncoders) -> Texts:
    wanted, empty = encoders.texts(args.prompt)
    if args.text is not None:
        wanted = cached_text(args.text)
    tokens, features = config.data.text_tokens, config.model.text_dim
    return Texts(*(padded_text(text, tokens, features) for text in (wanted, empty)))


def sampler_params(args: argparse.Namespace, config: Config, trajectory: Trajectory | None) -> SamplerParams:
    if args.camera_guidance != 1 and trajectory is None:
        raise ValueError("--camera-guidance needs a camera to be guided by: --camera, --orbit, --dolly or --pan")
    # Without a text both passes would be the same one.
    text = args.guidance if args.prompt is not None or args.text is not None else 1.0
    shift = config.flow.shift if args.shift is None else args.shift
    return SamplerParams(args.steps, args.sampler, shift, Guidance(text, args.camera_guidance), args.seed)


def report_steps(params: SamplerParams) -> Callable[[int], None]:
    """Says every few seconds how far the sampler is."""
    last = time.monotonic()

    def report(done: int) -> None:
        nonlocal last
        if time.monotonic() - last > REPORT_S:
            last = time.monotonic()
            log.info(f"step {done} of {params.steps}")

    return report


def assemble(
    args: argparse.Namespace,
    frames: NDArray[np.uint8],
    prediction: Prediction,
    asked: Trajectory | None,
    record: dict[str, Any],
) -> Clip:
    """What is written of a clip of frames [T, H, W, 3]."""
    depth, points, confidence, pose9 = (part[0].float().cpu() for part in prediction[1:] if part is not None)
    predicted = decoded_trajectory(pose9, frames.shape[1:3])
    cloud = chosen_points(
        points.permute(0, 2, 3, 1).numpy(), frames, confidence.numpy(), args.unsure, args.points, args.seed
    )
    if asked is not None:
        apart = distance_between(predicted, asked)
        record["camera"]["predicted_off"] = {"deg": apart.rotation_deg, "scene_scales": apart.centre}
    paths = [relative_path(path).numpy() for path in (asked, predicted) if path is not None]
    sheet = contact_sheet(frames, depth.numpy(), paths, sheet_lines(record))
    return Clip(frames, depth.numpy(), cloud, predicted.cameras(), sheet, args.fps, record)


def sheet_lines(record: dict[str, Any]) -> list[str]:
    """The record in words."""
    camera = record["camera"]
    asked = " ".join(str(camera[name]) for name in ("from", "file", "amount", "unit") if camera.get(name) is not None)
    lines = [f"{name}: {record[name]}" for name in ("prompt", "text", "image") if record[name] is not None]
    lines.append(f"camera: {asked or 'none asked for'}")
    if "predicted_off" in camera:
        off = camera["predicted_off"]
        lines.append(f"predicted cameras are off by {off['deg']:.1f} degrees, {off['scene_scales']:.3f} scene scales")
    lines.append(
        f"seed {record['seed']}, {record['steps']} steps of {record['sampler']}, shift {record['shift']:g}, guidance "
        f"{record['guidance']:g} (camera {record['camera_guidance']:g}), {record['checkpoint']} of {record['stage']}"
    )
    return lines


def describe(args: argparse.Namespace, info: StageInfo, shape: Shape, params: SamplerParams) -> dict[str, Any]:
    """What was asked for; the first part of sample.json."""
    motion = asked_motion(args)
    camera: dict[str, Any] = {"from": None}
    if args.camera is not None:
        camera = {"from": "file", "file": args.camera.name, "scene_scale": args.scene_scale}
    elif motion is not None:
        camera = {"from": motion[0], "amount": motion[1], "unit": "scene scales" if motion[0] == "dolly" else "degrees"}
    return {
        "checkpoint": args.checkpoint.name,
        "stage": info.stage,
        "step": info.step,
        "config_hash": info.config_hash,
        "base_hash": info.base_hash,
        "prompt": args.prompt,
        "text": None if args.text is None else args.text.name,
        "image": None if args.image is None else args.image.name,
        "camera": camera,
        "frames": shape.frames,
        "height": shape.height,
        "width": shape.width,
        "fps": float(args.fps),
        "seed": params.seed,
        "sampler": params.solver,
        "steps": params.steps,
        "shift": params.shift,
        "guidance": params.guidance.text,
        "camera_guidance": params.guidance.camera,
        "geometry": {"level": args.level, "camera_shown": args.show_camera},
    }


def check_numbers(args: argparse.Namespace) -> None:
    """Refuses options out of range before anything is read."""
    wrong = {
        "--steps must be at least 1": args.steps < 1,
        "--fps must be positive": not args.fps > 0,
        "--fov must lie between 1 and 170 degrees": not 1 <= args.fov <= 170,
        "--focus must be positive": not args.focus > 0,
        "--scene-scale must be positive": not args.scene_scale > 0,
        "--level must lie between 0 and 1": not 0 <= args.level <= 1,
        "--unsure is a share, from 0 to below 1": not 0 <= args.unsure < 1,
        "--points must be at least 1": args.points < 1,
    }
    problems = [problem for problem, is_wrong in wrong.items() if is_wrong]
    if problems:
        raise ValueError("; ".join(problems))


def parse_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not height x width, as 336x592")
    return int(height), int(width)
