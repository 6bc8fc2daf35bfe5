"""Cameras and labels that networks have predicted for a clip's frames: VGGT, DUSt3R and its kin, Depth Anything.

Arrays come from an npz file or from a folder of npy files with the same names; pickled ones are never read. Networks see the
frames stretched, cropped or padded to a size of their own; `Region` says which part of the pictures that is.
Axes: T frames, h x w pixels of the network.
"""

import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.convert_clip import Labels, Source, rotations
from data_tools.framing import Fit, Region, fitted_region, region_intrinsics
from data_tools.pictures import Pictures, natural_order
from fw_train.batch import DepthKind
from fw_train.data.schema import read_npy_header
from fw_train.geometry import Cameras, invert_rigid

Array = NDArray[Any]

VGGT_SIDE, VGGT_STEP = 518, 14
NETWORK_PIXELS = 2048 * 2048  # of a frame: more than these networks give, for pictures that are smaller
HEADER_BYTES = 1 << 16  # of an npy file, more than np.save writes
READ_BYTES = 1 << 20
DEPTH = ("depth", "depths", "depthmaps", "depth_map", "disparity", "predictions", "arr_0")
POINTS = ("world_points", "pts3d", "points")
CONFIDENCE = ("depth_conf", "conf", "confidence", "world_points_conf")
C2W = ("im_poses", "poses", "cams2world")
FOCALS = ("focals", "focal")
CENTRES = ("principal_points", "pp")


def read_vggt(path: Path, pictures: Pictures, fit: Fit | None, least_confidence: float | None) -> Source:
    """VGGT's predictions: depth [T, h, w, 1], extrinsic [T, 3, 4] (cam_from_world), intrinsic [T, 3, 3] (network's pixels).

    Points are the depth unprojected, which its authors found better than `world_points`; these are read where depth is missing.
    """
    arrays = _Arrays(path, pictures)
    cam_from_world = _batchless(arrays.need(("extrinsic", "extrinsics"), "cameras"), 3)
    matrix = _batchless(arrays.need(("intrinsic", "intrinsics"), "cameras"), 3)
    _shape(path, "intrinsic", matrix, (len(pictures.names), 3, 3))
    _shape(path, "extrinsic", cam_from_world, (len(pictures.names), None, 4))
    poses = rotations(cam_from_world, path, pictures.names)
    table = torch.from_numpy(matrix.astype(np.float64))
    intrinsics = torch.stack((table[:, 0, 0], table[:, 1, 1], table[:, 0, 2], table[:, 1, 2]), dim=-1)
    return _predicted(path, arrays, pictures, poses, intrinsics, fit or "vggt", least_confidence, "VGGT")


def read_dust3r(path: Path, pictures: Pictures, fit: Fit | None, least_confidence: float | None) -> Source:
    """DUSt3R's aligned scene: im_poses [T, 4, 4] (world_from_cam), focals [T] in the network's pixels, and depths [T, h, w] or
    pts3d [T, h, w, 3]."""
    arrays = _Arrays(path, pictures)
    frames = len(pictures.names)
    world_from_cam = arrays.need(C2W, "cameras")
    _shape(path, "im_poses", world_from_cam, (frames, 4, 4))
    focals = arrays.need(FOCALS, "focal lengths").reshape(len(world_from_cam), -1).astype(np.float64)
    if focals.shape[1] not in (1, 2):
        raise ValueError(f"{path}: focals {list(focals.shape)} are not one or two numbers for each of {frames} frames")
    poses = invert_rigid(rotations(world_from_cam, path, pictures.names))
    centres = arrays.get(CENTRES)
    if centres is None:
        height, width = _label_size(path, arrays)
        centres = np.array([[width / 2, height / 2]] * frames)
    _shape(path, "principal_points", centres, (frames, 2))
    both = np.concatenate((np.broadcast_to(focals, (frames, 2)), centres.astype(np.float64)), axis=1)
    return _predicted(path, arrays, pictures, poses, torch.from_numpy(both), fit or "crop", least_confidence, "DUSt3R")


def read_depth_anything(path: Path, pictures: Pictures, cameras: Cameras, kind: DepthKind, camera_file: Path) -> Source:
    """Depth [T, h, w] of whole frames for a clip that has its video and cameras; metric depth gives points too, if it is in the
    units of the cameras."""
    frames = len(pictures.names)
    inputs: tuple[Path, ...] = (path,)
    if path.is_dir():
        inputs = tuple(sorted(path.glob("*.npy"), key=natural_order))
        depth = np.stack([_load(file, pictures) for file in inputs]) if inputs else np.empty(0)
    elif path.suffix == ".npy":
        depth = _load(path, pictures)
    else:
        arrays = _Arrays(path, pictures)
        depth = arrays.need(DEPTH if len(arrays.names) > 1 else tuple(arrays.names), "depth")
    depth = _frames_of(path, depth, frames)
    replaces = frozenset({"depth", "points"} if kind == "metric" else {"depth"})
    if kind == "metric":
        inputs = (*inputs, camera_file)
    return Source(
        pictures, cameras, depth=lambda t: depth[t], depth_kind=kind, inputs=inputs, origin="", replaces=replaces
    )


def _predicted(
    path: Path,
    arrays: "_Arrays",
    pictures: Pictures,
    cam_from_world: torch.Tensor,
    intrinsics_px: torch.Tensor,
    fit: Fit | Literal["vggt"],
    least_confidence: float | None,
    origin: str,
) -> Source:
    frames = len(pictures.names)
    depth = arrays.get(DEPTH)
    points = arrays.get(POINTS) if depth is None else None
    height, width = _label_size(path, arrays)
    picture = pictures.height, pictures.width
    region = vggt_region(picture, (height, width)) if fit == "vggt" else fitted_region(picture, (height, width), fit)
    fractions = intrinsics_px / torch.tensor([width, height] * 2, dtype=intrinsics_px.dtype)
    if (fractions[:, :2] <= 0).any() or (fractions[:, 2:] <= 0).any() or (fractions[:, 2:] >= 1).any():
        raise ValueError(
            f"{path}: intrinsics {intrinsics_px[0].tolist()} are not pixels of the network's {height}x{width} (height x width)"
        )
    conf = arrays.get(CONFIDENCE) if least_confidence is not None else None
    if least_confidence is not None and conf is None:
        raise ValueError(f"{path} has none of {', '.join(CONFIDENCE)}, which --min-confidence needs")
    conf = None if conf is None else _frames_of(path, conf, frames)

    def sure(t: int, values: Array) -> Array:
        if conf is None:
            return values
        kept = conf[t] >= least_confidence
        return np.where(kept if values.ndim == 2 else kept[..., None], values, np.nan)

    depths = None if depth is None else _frames_of(path, depth, frames)
    clouds = None if points is None else _batchless(points, 4)
    if clouds is not None:
        _shape(path, "points", clouds, (frames, height, width, 3))
    give_depth: Labels | None = None if depths is None else lambda t: sure(t, depths[t])
    give_points: Labels | None = None if clouds is None else lambda t: sure(t, clouds[t])
    inputs = (path,) if path.is_file() else tuple(sorted(path.glob("*.npy")))
    return Source(
        pictures,
        Cameras(cam_from_world, region_intrinsics(fractions, region, picture)),
        depth=give_depth,
        points=give_points,
        region=region,
        inputs=inputs,
        settings=f"least confidence {least_confidence}",
        origin=origin,
    )


def for_raw_clip(source: Source) -> Source:
    """The source as labels and cameras of a clip that has its video in the raw folder."""
    return replace(source, replaces=frozenset({"depth", "points", "cameras"}))


def vggt_region(picture: tuple[int, int], labels: tuple[int, int]) -> Region:
    """As its `load_and_preprocess_images` makes it: width 518, height a multiple of 14, of which the middle 518; or padded."""
    stretched = round(picture[0] * VGGT_SIDE / picture[1] / VGGT_STEP) * VGGT_STEP
    if labels == (min(stretched, VGGT_SIDE), VGGT_SIDE):
        height = picture[0] * labels[0] / stretched
        return Region((picture[0] - height) / 2, 0, height, picture[1])
    if labels == (VGGT_SIDE, VGGT_SIDE):
        return fitted_region(picture, labels, "pad")
    apart = labels[0] * picture[1] / (labels[1] * picture[0])
    if abs(apart - 1) > 0.04:  # more than rounding to its steps
        raise ValueError(
            f"labels of {labels[0]}x{labels[1]} (height x width) for pictures of {picture[0]}x{picture[1]}: say how the "
            "network saw them with --fit whole, crop or pad"
        )
    return fitted_region(picture, labels, "whole")


class _Arrays:
    """Arrays by name, each read when it is asked for: others in the file may be pickled."""

    def __init__(self, path: Path, pictures: Pictures) -> None:
        self.path, self._pictures = path, pictures
        self.names: Mapping[str, Path | None]
        if path.is_dir():
            self.names = {file.stem: file for file in sorted(path.glob("*.npy"))}
        elif not path.is_file():
            raise ValueError(f"no file {path}")
        elif not zipfile.is_zipfile(path):
            raise ValueError(
                f"{path} is no npz file, or is cut short; give what np.savez wrote, or a folder of npy files"
            )
        else:
            with np.load(path, allow_pickle=False) as archive:
                self.names = dict.fromkeys(archive.files)
        self._read: dict[str, Array] = {}

    def get(self, names: tuple[str, ...]) -> Array | None:
        """The first of the names that is there."""
        name = next((name for name in names if name in self.names), None)
        if name is None:
            return None
        if name not in self._read:
            file = self.names[name]
            read = _load_packed(self.path, name, self._pictures) if file is None else _load(file, self._pictures)
            self._read[name] = read
        return self._read[name]

    def need(self, names: tuple[str, ...], what: str) -> Array:
        found = self.get(names)
        if found is None:
            there = ", ".join(self.names) or "nothing"
            raise ValueError(f"{self.path} has no {' or '.join(names)} ({what}); it has {there}")
        return found


def _load(path: Path, pictures: Pictures) -> Array:
    with open(path, "rb") as file:
        return _read_array(file, path.stat().st_size, f"{path}", pictures)


def _load_packed(path: Path, name: str, pictures: Pictures) -> Array:
    """An array of an npz file."""
    where = f"{path}, {name}"
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as file:
                return _read_array(file, info.file_size, where, pictures)
    except (KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{where} is damaged, or packed as np.savez does not do it ({error}); save it again") from None


def _read_array(file: IO[bytes], file_bytes: int, where: str, pictures: Pictures) -> Array:
    """The numbers of an npy file; what cannot be labels of the pictures is refused before it is read or unpacked."""
    start = file.read(HEADER_BYTES)
    header = read_npy_header(start, file_bytes, where)
    if header.dtype.kind not in "fiu":
        raise ValueError(f"{where} holds no plain numbers; save arrays of float32")
    frames, pixels = len(pictures.names), max(pictures.height * pictures.width, NETWORK_PIXELS)
    if math.prod(header.shape) > 3 * frames * pixels:
        raise ValueError(
            f"{where} declares {list(header.shape)} {header.dtype}: more than x, y and z of {pixels} pixels in {frames} frames, so "
            "it does not belong to this clip; save its labels at the size that the network gave"
        )
    data, at = bytearray(file_bytes), len(start)
    data[:at] = start
    # Never all that there is: zip files may hold more than they declare.
    while part := file.read(min(READ_BYTES, file_bytes - at)):
        data[at : at + len(part)] = part
        at += len(part)
    if at < file_bytes:
        raise ValueError(f"{where} ends after {at} of {file_bytes} bytes; copy or save it again")
    return header.array(data)


def _label_size(path: Path, arrays: _Arrays) -> tuple[int, int]:
    depth = arrays.get(DEPTH)
    if depth is not None:
        shape = depth.shape[:-1] if depth.shape[-1] == 1 else depth.shape
        return shape[-2], shape[-1]
    height, width = arrays.need(POINTS, "depth is not there either").shape[-3:-1]
    return height, width


def _frames_of(path: Path, values: Array, frames: int) -> Array:
    """Values [T, h, w] of an array that may have a batch axis before or a channel behind."""
    if values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    values = _batchless(values, 3)
    _shape(path, "an array", values, (frames, None, None))
    return values


def _batchless(values: Array, axes: int) -> Array:
    return values[0] if values.ndim == axes + 1 and values.shape[0] == 1 else values


def _shape(path: Path, name: str, values: Array, wanted: tuple[int | None, ...]) -> None:
    if values.ndim != len(wanted) or any(
        want not in (None, found) for want, found in zip(wanted, values.shape, strict=True)
    ):
        shown = ", ".join("any" if want is None else str(want) for want in wanted)
        raise ValueError(
            f"{path}: {name} is {list(values.shape)}, [{shown}] is needed; the clip has {wanted[0]} frames, and the "
            "tool must have seen each of them"
        )
