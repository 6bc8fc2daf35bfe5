"""COLMAP: a sparse model in text or binary form, the undistorted images, and dense depth maps where they are.

Layout, as `colmap image_undistorter` and `colmap patch_match_stereo` leave it; the model may also lie in sparse/0:

    images/*.png   sparse/{cameras,images}.{bin,txt}   stereo/depth_maps/<image>.geometric.bin

A pose is a quaternion w, x, y, z and a translation, world to camera, with our axes. Intrinsics are in pixels, whose centres lie
at +0.5.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.convert_clip import Labels, Source
from data_tools.pictures import image_files, open_images
from fw_train.geometry import Cameras, rigid

# In the order of COLMAP's numbers; only the first two are pinholes.
MODELS = (
    "SIMPLE_PINHOLE",
    "PINHOLE",
    "SIMPLE_RADIAL",
    "RADIAL",
    "OPENCV",
    "OPENCV_FISHEYE",
    "FULL_OPENCV",
    "FOV",
    "SIMPLE_RADIAL_FISHEYE",
    "RADIAL_FISHEYE",
    "THIN_PRISM_FISHEYE",
)
PARAMETERS = {"SIMPLE_PINHOLE": 3, "PINHOLE": 4}  # f cx cy; fx fy cx cy
POINT_BYTES = 24  # of a keypoint in images.bin

Item = TypeVar("Item")


class Lens(NamedTuple):
    width: int
    height: int
    intrinsics_px: tuple[float, ...]


class Pose(NamedTuple):
    quaternion_wxyz: tuple[float, ...]
    translation: tuple[float, ...]
    lens: int


def read_colmap(scene: Path, images: str) -> Source:
    """The scene whose frames are the images of a folder, in the order of their names."""
    model = _model_folder(scene)
    folder = scene / images
    lenses, poses = _read_cameras(model), _read_images(model)
    files = image_files(folder)
    names = [file.relative_to(folder).as_posix() for file in files]
    unknown = sorted(set(poses) - set(names))
    if unknown:
        raise ValueError(
            f"{model} has {unknown[0]} and {len(unknown) - 1} more images that {folder} has not; give the folder with --images"
        )
    pictures = open_images(files, folder)
    gaps = {t: "the model has no pose for it" for t, name in enumerate(names) if name not in poses}
    some = next(iter(poses.values()))  # stands in where a frame has none
    rows = [poses.get(name, some) for name in names]
    intrinsics = [_fractions(lenses, pose, model, (pictures.height, pictures.width)) for pose in rows]
    rotation = np.stack([rotation_of(pose.quaternion_wxyz, name) for pose, name in zip(rows, names, strict=True)])
    translation = torch.tensor([pose.translation for pose in rows], dtype=torch.float64)
    depth_files = [scene / "stereo" / "depth_maps" / f"{name}.geometric.bin" for name in names]
    there = [file.is_file() for file in depth_files]
    if any(there):
        gaps |= {t: f"no {depth_files[t]}" for t, is_there in enumerate(there) if not is_there and t not in gaps}
    depth: Labels | None = (lambda t: read_depth_map(depth_files[t])) if any(there) else None
    return Source(
        pictures,
        Cameras(rigid(torch.from_numpy(rotation), translation), torch.tensor(intrinsics, dtype=torch.float64)),
        depth=depth,
        gaps=gaps,
        inputs=(*_model_files(model), *(file for file, is_there in zip(depth_files, there, strict=True) if is_there)),
        origin="COLMAP",
    )


def rotation_of(quaternion_wxyz: tuple[float, ...], name: str) -> NDArray[np.float64]:
    """The matrix [3, 3] of a quaternion of any length."""
    q = np.array(quaternion_wxyz)
    length = np.linalg.norm(q)
    if not 1e-9 < length < np.inf:
        raise ValueError(f"{name}: its quaternion {list(quaternion_wxyz)} has no direction")
    w, x, y, z = q / length
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def read_depth_map(path: Path) -> NDArray[np.float32]:
    """COLMAP's array file [h, w]: `width&height&channels&`, then float32 rows."""
    data = path.read_bytes()
    fields = data[:64].split(b"&", 3)
    if len(fields) < 4 or not all(field.isdigit() for field in fields[:3]):
        raise ValueError(f"{path} does not begin with width&height&channels&; it is no depth map of COLMAP's")
    width, height, channels = (int(field) for field in fields[:3])
    start = len(b"&".join(fields[:3])) + 1
    if channels != 1 or len(data) - start != 4 * width * height:
        raise ValueError(
            f"{path} declares {width}x{height}x{channels} float32 and has {len(data) - start} bytes of them; "
            "it is cut short, run `colmap patch_match_stereo` again"
        )
    return np.frombuffer(data, "<f4", width * height, start).reshape(height, width)


def _model_folder(scene: Path) -> Path:
    tried = [scene / "sparse", scene / "sparse" / "0", scene]
    for folder in tried:
        if (folder / "cameras.bin").is_file() or (folder / "cameras.txt").is_file():
            return folder
    raise ValueError(f"no cameras.bin or cameras.txt in {', '.join(map(str, tried))}; give the folder that has sparse/")


def _model_files(model: Path) -> tuple[Path, Path]:
    form = ".bin" if (model / "cameras.bin").is_file() else ".txt"
    return model / f"cameras{form}", model / f"images{form}"


def _read_cameras(model: Path) -> dict[int, Lens]:
    path = _model_files(model)[0]
    if path.suffix == ".bin":
        return dict(_records(path, _camera_record))
    lenses = {}
    for line in _lines(path):
        words = line.split()
        try:
            number, name, width, height = int(words[0]), words[1], int(words[2]), int(words[3])
            lenses[number] = _lens(path, name, width, height, tuple(map(float, words[4:])))
        except IndexError:
            raise ValueError(f"{path}: {line!r:.80} is not CAMERA_ID MODEL WIDTH HEIGHT PARAMS") from None
    return lenses


def _read_images(model: Path) -> dict[str, Pose]:
    path = _model_files(model)[1]
    if not path.is_file():
        raise ValueError(f"no {path} beside the cameras")
    poses = dict(_records(path, _image_record)) if path.suffix == ".bin" else _text_images(path)
    if not poses:
        raise ValueError(f"{path} has no images")
    return poses


def _text_images(path: Path) -> dict[str, Pose]:
    """Two lines an image, of which the second, its keypoints, may be empty."""
    poses = {}
    for line in _lines(path)[::2]:
        words = line.split(maxsplit=9)
        if len(words) != 10:
            raise ValueError(f"{path}: {line!r:.80} is not IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME")
        numbers = tuple(map(float, words[1:8]))
        poses[words[9].strip()] = Pose(numbers[:4], numbers[4:], int(words[8]))
    return poses


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"no {path}")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def _records(path: Path, read: Callable[[Path, bytes, int], tuple[Item, int]]) -> list[Item]:
    """The records of a binary file that begins with their number."""
    data = path.read_bytes()
    records: list[Item] = []
    try:
        (count,) = struct.unpack_from("<Q", data)
        at = 8
        for _ in range(count):
            record, at = read(path, data, at)
            records.append(record)
        if at > len(data):
            raise struct.error
    except (struct.error, IndexError):
        raise ValueError(
            f"{path} ends after {len(data)} bytes within record {len(records)}; it is cut short, copy or export it again"
        ) from None
    return records


def _camera_record(path: Path, data: bytes, at: int) -> tuple[tuple[int, Lens], int]:
    number, model, width, height = struct.unpack_from("<IiQQ", data, at)
    name = MODELS[model] if 0 <= model < len(MODELS) else f"number {model}"
    count = PARAMETERS.get(name, 0)
    parameters = struct.unpack_from(f"<{count}d", data, at + 24)
    return (number, _lens(path, name, width, height, parameters)), at + 24 + 8 * count


def _image_record(path: Path, data: bytes, at: int) -> tuple[tuple[str, Pose], int]:
    values = struct.unpack_from("<I7dI", data, at)
    end = data.find(b"\0", at + 64)
    if end < 0:
        raise struct.error
    (points,) = struct.unpack_from("<Q", data, end + 1)
    name = data[at + 64 : end].decode("utf-8", "replace")
    return (name, Pose(values[1:5], values[5:8], values[8])), end + 9 + POINT_BYTES * points


def _lens(path: Path, model: str, width: int, height: int, parameters: tuple[float, ...]) -> Lens:
    if model not in PARAMETERS:
        raise ValueError(
            f"{path}: the camera model {model} has lens distortion; cameras are pinholes here, so run `colmap image_undistorter "
            "--image_path IMAGES --input_path sparse/0 --output_path dense` and convert dense"
        )
    if len(parameters) != PARAMETERS[model]:
        raise ValueError(f"{path}: {model} has {PARAMETERS[model]} parameters, not {len(parameters)}")
    fx, fy, cx, cy = parameters if model == "PINHOLE" else (parameters[0], *parameters)
    return Lens(width, height, (fx, fy, cx, cy))


def _fractions(lenses: dict[int, Lens], pose: Pose, model: Path, picture: tuple[int, int]) -> list[float]:
    if pose.lens not in lenses:
        raise ValueError(f"{model}: an image has camera {pose.lens}, which the cameras lack")
    lens = lenses[pose.lens]
    if abs(lens.width * picture[0] / (lens.height * picture[1]) - 1) > 0.01:
        raise ValueError(
            f"{model}: camera {pose.lens} is {lens.height}x{lens.width} (height x width), the images are "
            f"{picture[0]}x{picture[1]}; give the images that the model was made from with --images"
        )
    fx, fy, cx, cy = lens.intrinsics_px
    return [fx / lens.width, fy / lens.height, cx / lens.width, cy / lens.height]
