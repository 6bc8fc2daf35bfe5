"""Small raw folders: a tilted wall before a camera that moves to the right, with exact depth, points and cameras."""

import json

import av
import numpy as np
import torch

from fw_train.camera_files import write_cameras
from fw_train.geometry import Cameras

FOCAL = 1.2  # of the width


def clip_labels(frames=5, height=32, width=48, step=0.1, slope=0.3):
    """Depth [T, H, W], points [T, H, W, 3] in the first camera's frame and cameras of the wall z = 2 + slope * x."""
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x, y = (u - width / 2) / (FOCAL * width), (v - height / 2) / (FOCAL * width)
    centres = step * np.arange(frames)
    depth = (2 + slope * centres[:, None, None]) / (1 - slope * x)
    points = np.stack((x * depth + centres[:, None, None], y * depth, depth), axis=-1)
    poses = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    poses[:, 0, 3] = -torch.from_numpy(centres)
    intrinsics = torch.tensor([FOCAL, FOCAL * width / height, 0.5, 0.5], dtype=torch.float64).repeat(frames, 1)
    return depth.astype(np.float32), points.astype(np.float32), Cameras(poses, intrinsics)


def write_video(path, frames, height, width, fps=16, **codec_options):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"threads": "1", **codec_options})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(frames):
            pixels = np.add.outer(np.arange(height) * 5, np.arange(width) * 3 + 20 * t).astype(np.uint8)
            picture = av.VideoFrame.from_ndarray(np.repeat(pixels[..., None], 3, axis=2), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_clip(raw, clip_id, frames=5, height=32, width=48, **changes):
    """Writes a clip's files and returns its metadata entry."""
    depth, points, cameras = clip_labels(frames, height, width)
    for folder in ("videos", "camera_params", f"depth/{clip_id}", f"points/{clip_id}"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    write_video(raw / "videos" / f"{clip_id}.mp4", frames, height, width)
    for t in range(frames):
        np.save(raw / "depth" / clip_id / f"frame_{t:04}.npy", depth[t])
        np.save(raw / "points" / clip_id / f"frame_{t:04}.npy", points[t])
    write_cameras(raw / "camera_params" / f"{clip_id}.txt", cameras)
    entry = {"id": clip_id, "caption": f"a tilted wall, {clip_id}", "fps": 16, "width": width, "height": height}
    return {**entry, "depth_kind": "metric", **changes}


def write_metadata(raw, entries):
    (raw / "metadata.json").write_text(json.dumps(entries))


def make_raw(raw, clips=3, **size):
    entries = [write_clip(raw, f"clip_{i}", **size) for i in range(clips)]
    write_metadata(raw, entries)
    return entries


def contents(folder):
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
