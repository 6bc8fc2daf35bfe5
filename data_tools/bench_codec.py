"""Size, error and speed of the label codec on synthetic clips, per core.

    OMP_NUM_THREADS=1 python -m data_tools.bench_codec [--frames 81 --height 336 --width 592 --repeat 3]

Takes about two minutes at the default size. Rates are raw float32 bytes per second, the best of the repeats.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fw_train.data.codec import Encoded, decode_codes, decode_depth, decode_points, encode_depth, encode_points
from fw_train.data.codec_format import PRESET_NAMES, PresetName

Result = TypeVar("Result")


class Clip(NamedTuple):
    """Exact labels of a rendered scene, with +x right, +y down, +z ahead."""

    depth: NDArray[np.float32]  # [T, H, W]
    points: NDArray[np.float32]  # [T, H, W, 3], in the first camera's frame
    own_points: NDArray[np.float32]  # [T, H, W, 3], in each camera's own frame


def synthetic_clip(frames: int, height: int, width: int, fov_deg: float = 60.0, seed: int = 0) -> Clip:
    """A rippled room with spheres in it, seen by a camera that turns and drifts; `fov_deg` is horizontal."""
    rng = np.random.default_rng(seed)
    focal_px = width / 2 / np.tan(np.radians(fov_deg) / 2)
    v, u = np.mgrid[0.5:height, 0.5:width]
    rays = np.stack(((u - width / 2) / focal_px, (v - height / 2) / focal_px, np.ones_like(u)), axis=-1)
    walls = [((0, 1, 0), 1.6), ((0, -1, 0), 3.0), ((1, 0, 0), 6.0), ((-1, 0, 0), 6.0), ((0.2, 0, 1), 16.0)]
    spheres = [(rng.uniform((-4, -1, 3), (4, 1, 12)), rng.uniform(0.4, 1.2)) for _ in range(24)]

    depth = np.empty((frames, height, width), np.float32)
    points, own_points = np.empty((2, frames, height, width, 3), np.float32)
    for t in range(frames):
        yaw, pitch = 0.3 * np.sin(0.08 * t), 0.05 * np.sin(0.1 * t)
        turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
        tilt = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
        centre = np.array([0.8 * np.sin(0.05 * t), 0.1 * np.sin(0.11 * t), 0.02 * t])
        towards = rays @ (turn @ tilt).T
        z = np.full((height, width), 50.0)
        for normal, offset in walls:
            unit = np.array(normal) / np.linalg.norm(normal)
            facing = np.maximum(towards @ unit, 1e-9)
            z = np.minimum(z, (offset - centre @ unit) / facing)
        squared = np.sum(towards**2, axis=-1)
        for middle, radius in spheres:
            along = towards @ (middle - centre)
            inside = along**2 - squared * (np.sum((middle - centre) ** 2) - radius**2)
            hit = (along - np.sqrt(np.maximum(inside, 0))) / squared
            z = np.where((inside > 0) & (hit > 0.05) & (hit < z), hit, z)
        x, y, ahead = np.moveaxis(centre + z[..., None] * towards, -1, 0)
        z *= 1 + 0.004 * np.sin(3 * x) * np.sin(2 * y + 2.5 * ahead)
        depth[t], points[t], own_points[t] = z, centre + z[..., None] * towards, z[..., None] * rays
    return Clip(depth, points, own_points)


def _best_of(repeat: int, work: Callable[[], Result]) -> tuple[Result, float]:
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def _measure(name: str, labels: NDArray[np.float32], preset: PresetName, repeat: int) -> Encoded:
    """Prints one line of the table."""
    is_depth = labels.ndim == 3
    encode, decode = (encode_depth, decode_depth) if is_depth else (encode_points, decode_points)
    encoded, encode_s = _best_of(repeat, lambda: encode(labels, preset=preset))
    _, codes_s = _best_of(repeat, lambda: decode_codes(encoded.data))
    (values, _), decode_s = _best_of(repeat, lambda: decode(encoded.data))
    if preset == "lossless" and not np.array_equal(values.view(np.uint32), labels.view(np.uint32)):
        raise AssertionError(f"{name}: lossless labels came back changed")
    report, raw_mb = encoded.report, labels.nbytes / 1e6
    rates = "".join(f"{raw_mb / seconds:10.0f}" for seconds in (encode_s, codes_s, decode_s))
    size = f"{report.encoded_bytes / 1e6:8.2f}{report.raw_bytes / report.encoded_bytes:8.1f}x"
    print(f"{name:34}{preset:10}{size}{report.max_rel_error:12.2e}{rates}  {report.why}", flush=True)
    return encoded


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Size, error and speed of the label codec, per core.")
    for name, default in (("frames", 81), ("height", 336), ("width", 592), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(arguments)

    print(
        f"{'':34}{'preset':10}{'MB':>8}{'ratio':>9}{'max error':>12}{'encode':>10}{'to codes':>10}{'to f32':>10}  MB/s"
    )
    for fov_deg in (60, 90):
        clip = synthetic_clip(args.frames, args.height, args.width, fov_deg)
        for preset in PRESET_NAMES:
            both = [
                _measure(f"depth, {fov_deg} degrees", clip.depth, preset, args.repeat).report,
                _measure(f"points, {fov_deg} degrees", clip.points, preset, args.repeat).report,
            ]
            ratio = sum(r.raw_bytes for r in both) / sum(r.encoded_bytes for r in both)
            print(f"{'  together':34}{preset:10}{sum(r.encoded_bytes for r in both) / 1e6:8.2f}{ratio:8.1f}x")
    rng = np.random.default_rng(0)
    scale = 1 + 0.01 * rng.standard_normal(clip.depth.shape, dtype=np.float32)
    _measure("depth, 1 % noise", clip.depth * scale, "default", args.repeat)
    _measure("own points, 1 % noise along rays", clip.own_points * scale[..., None], "default", args.repeat)
    jitter = 1 + 0.003 * rng.standard_normal(clip.points.shape, dtype=np.float32)
    _measure("points, 0.3 % noise", clip.points * jitter, "default", args.repeat)


if __name__ == "__main__":
    main()
