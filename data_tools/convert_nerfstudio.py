"""Nerfstudio (and instant-ngp): transforms.json with camera-to-world matrices, the images, and depth images where they are.

Poses have OpenGL's axes: x right, y up, z towards the viewer. Intrinsics are in pixels, for all frames or for each.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.convert_clip import Labels, Source, rotations
from data_tools.pictures import IMAGE_SUFFIXES, natural_order, open_images, read_gray16
from fw_train.data.schema import parse_npy
from fw_train.data.strict_json import read_json
from fw_train.geometry import Cameras, invert_rigid

FILE = "transforms.json"
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
PINHOLES = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE")  # without distortion, all the same
DEPTH_UNIT = 1e-3  # of depth files, in units of the poses, where transforms.json has no depth_unit_scale_factor


def read_nerfstudio(scene: Path) -> Source:
    """The scene of a folder with transforms.json, or of such a file; frames in the order of their names."""
    path = scene / FILE if scene.is_dir() else scene
    if not path.is_file():
        raise ValueError(f"no {path}")
    document = read_json(path.read_bytes(), str(path))
    frames = document.get("frames") if isinstance(document, dict) else None
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise ValueError(f"{path} has no list `frames` of objects")
    for frame in frames:
        if not isinstance(frame.get("file_path"), str):
            raise ValueError(f"{path}: a frame has no file_path")
    frames = sorted(frames, key=lambda frame: natural_order(Path(frame["file_path"])))
    names = tuple(frame["file_path"] for frame in frames)
    pictures = open_images([_image_path(path.parent, name) for name in names], path.parent)
    size = pictures.height, pictures.width

    matrices = [_matrix(path, frame) for frame in frames]
    world_from_cam = rotations(np.stack(matrices), path, names)
    world_from_cam[:, :3, 1:3] *= -1  # OpenGL's axes to ours: y down, z forward
    intrinsics = torch.tensor([_fractions(path, {**document, **frame}, size) for frame in frames], dtype=torch.float64)

    with_depth = [frame.get("depth_file_path") for frame in frames]
    depth_files = [path.parent / name if name else path for name in with_depth]
    gaps = {
        t: f"{path} has no depth_file_path for it" for t, name in enumerate(with_depth) if any(with_depth) and not name
    }
    gaps |= {t: f"no {file}" for t, file in enumerate(depth_files) if not file.is_file()}
    gaps |= {t: f"no {file}" for t, file in enumerate(pictures.files) if not file.is_file()}
    unit = _number(path, document, "depth_unit_scale_factor", DEPTH_UNIT) * _number(
        path, document, "applied_scale", 1.0
    )
    depth: Labels | None = (lambda t: _depth(depth_files[t]) * unit) if any(with_depth) else None
    return Source(
        pictures,
        Cameras(invert_rigid(world_from_cam), intrinsics),
        depth=depth,
        gaps=gaps,
        inputs=(path, *(file for file in depth_files if file.is_file() and file != path)),
        origin="Nerfstudio",
    )


def _image_path(folder: Path, name: str) -> Path:
    """Synthetic scenes name their images without suffix."""
    path = folder / name
    if path.is_file() or path.suffix.lower() in IMAGE_SUFFIXES:
        return path
    return next((found for suffix in IMAGE_SUFFIXES if (found := folder / f"{name}{suffix}").is_file()), path)


def _matrix(path: Path, frame: dict[str, Any]) -> NDArray[np.float64]:
    try:
        matrix = np.array(frame.get("transform_matrix"), dtype=np.float64)
    except (TypeError, ValueError):
        matrix = np.empty(0)
    if matrix.shape not in ((4, 4), (3, 4)):
        raise ValueError(f"{path}, {frame['file_path']}: its transform_matrix is no 4x4 list of numbers")
    return matrix if len(matrix) == 4 else np.vstack((matrix, (0, 0, 0, 1)))


def _fractions(path: Path, values: dict[str, Any], picture: tuple[int, int]) -> list[float]:
    """fx, fy, cx, cy as fractions, from the values of a frame and those of all."""
    bent = {name: values[name] for name in DISTORTION if values.get(name)}
    model = values.get("camera_model", "OPENCV")
    if bent or model not in PINHOLES:
        raise ValueError(
            f"{path}: {f'lens distortion {bent}' if bent else f'camera model {model}'}; cameras are pinholes here, so undistort "
            "the images first (`colmap image_undistorter` on the model that they come from, then `fw data convert colmap`)"
        )
    width, height = _number(path, values, "w", picture[1]), _number(path, values, "h", picture[0])
    if abs(width * picture[0] / (height * picture[1]) - 1) > 0.01:
        raise ValueError(
            f"{path} is for images of {height:g}x{width:g} (height x width), they are {picture[0]}x{picture[1]}"
        )
    if "fl_x" in values:
        fx = _number(path, values, "fl_x", None)
    elif "camera_angle_x" in values:
        fx = 0.5 * width / math.tan(0.5 * _number(path, values, "camera_angle_x", None))
    else:
        raise ValueError(f"{path} has neither fl_x nor camera_angle_x, in all frames or in each")
    fy = _number(path, values, "fl_y", fx)
    cx, cy = _number(path, values, "cx", width / 2), _number(path, values, "cy", height / 2)
    return [fx / width, fy / height, cx / width, cy / height]


def _number(path: Path, values: dict[str, Any], name: str, default: float | None) -> float:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{path}: {name} is {value!r:.40}, not a number")
    return float(value)


def _depth(path: Path) -> NDArray[Any]:
    """A depth file [h, w] in its own units; images and npy alike, as Nerfstudio takes them."""
    if path.suffix == ".npy":
        depth = parse_npy(path.read_bytes(), str(path))
        depth = depth[..., 0] if depth.ndim == 3 and depth.shape[-1] == 1 else depth
        if depth.ndim != 2 or depth.dtype.kind not in "fu":
            raise ValueError(f"{path} is {depth.dtype} {list(depth.shape)}; numbers [h, w] are needed")
        return depth.astype(np.float64)
    return read_gray16(path).astype(np.float64)
