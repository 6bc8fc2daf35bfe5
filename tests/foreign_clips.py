"""One synthetic scene, written as other tools write theirs: from their formats' definitions, without the converters' mathematics.

The scene is a raw folder of `fw data synth`; its frames are read from the video, its labels and cameras from the files.
"""

import json
import math
import struct
from typing import NamedTuple

import av
import numpy as np

from data_tools import synth
from fw_train.camera_files import read_cameras
from fw_train.cli import main

FRAMES, HEIGHT, WIDTH, FPS = 9, 64, 96, 16
TOP, LEFT = 9, 3  # of these frames in larger ones of 80x112, so that the principal point is off the centre
STEP_US = 62500


class Scene(NamedTuple):
    pictures: np.ndarray  # [T, H, W, 3]
    depth: np.ndarray  # [T, H, W], metres; NaN in the sky
    points: np.ndarray  # [T, H, W, 3], in the first camera's frame
    rotation: np.ndarray  # [T, 3, 3], world to camera
    translation: np.ndarray  # [T, 3]
    focal_px: float
    cx: float
    cy: float


def make_scene(folder):
    """A scene whose world is not its first camera, so that nothing can hide in an identity."""
    assert main(["data", "synth", str(folder), "--scenes", "1", "--frames", str(FRAMES), "--size", "80x112",
                 "--fps", str(FPS), "--seed", "3", "--sky", "1", "--moving", "0", "--workers", "1"]) == 0  # fmt: skip
    (record,) = json.loads((folder / synth.METADATA_NAME).read_text())
    with av.open(str(folder / "videos" / f"{record['id']}.mp4")) as container:
        pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    depth, points = (
        np.stack([np.load(folder / kind / record["id"] / f"frame_{t:04}.npy") for t in range(FRAMES)])
        for kind in ("depth", "points")
    )
    rows = np.loadtxt(folder / "camera_params" / f"{record['id']}.txt")
    first = rows[:, 7:].reshape(FRAMES, 3, 4)
    # first camera from world: a turn of every axis and a shift
    turn = axis_turn(0, 0.4) @ axis_turn(1, -1.1) @ axis_turn(2, 0.7)
    shift = np.array([0.3, -2.0, 5.0])
    rotation = first[:, :, :3] @ turn
    translation = first[:, :, :3] @ shift + first[:, :, 3]
    fx, fy, cx, cy = rows[0, 1:5]
    assert math.isclose(fx * 112, fy * 80)
    part = np.s_[:, TOP : TOP + HEIGHT, LEFT : LEFT + WIDTH]
    centre = cx * 112 - LEFT, cy * 80 - TOP
    return Scene(pictures[part], depth[part], points[part], rotation, translation, fx * 112, *centre)


def convert(*arguments):
    return main(["data", "convert", *map(str, arguments), "--workers", "1"])


def result(raw, clip="clip"):
    """Cameras, depth and points of a raw folder's clip."""
    labels = [
        np.stack([np.load(path) for path in sorted((raw / kind / clip).glob("*.npy"))])
        if (raw / kind / clip).is_dir()
        else None
        for kind in ("depth", "points")
    ]
    return read_cameras(raw / "camera_params" / f"{clip}.txt"), *labels


def entries(raw):
    return json.loads((raw / "metadata.json").read_text())


def write_frames(scene, folder):
    for t, picture in enumerate(scene.pictures):
        write_image(folder / f"{t:04}.png", picture)
    return folder


def axis_turn(axis, angle):
    c, s = math.cos(angle), math.sin(angle)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


def centres(scene):
    return np.stack([-r.T @ t for r, t in zip(scene.rotation, scene.translation, strict=True)])


def world_points(scene):
    """[T, H, W, 3] of every pixel by its ray, from depth alone."""
    u, v = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    x, y = (u - scene.cx) / scene.focal_px, (v - scene.cy) / scene.focal_px
    rays = np.stack((x, y, np.ones_like(x)), axis=-1) * scene.depth[..., None].astype(np.float64)
    return np.stack([ray @ r + c for ray, r, c in zip(rays, scene.rotation, centres(scene), strict=True)])


def write_image(path, picture, pix_fmt="rgb24"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = pix_fmt.replace("16le", "16be")
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format=pix_fmt)))
        container.mux(stream.encode())


def write_re10k(scene, cameras, pictures, clip="clip"):
    """A camera file, and images by timestamp. The original frames were 16:9; these are their middle, 3:2."""
    cameras.mkdir(parents=True, exist_ok=True)
    original_width = HEIGHT * 16 / 9
    left = (original_width - WIDTH) / 2
    lines = ["https://www.youtube.com/watch?v=abcdefghijk"]
    for t, (r, shift) in enumerate(zip(scene.rotation, scene.translation, strict=True)):
        intrinsics = [
            scene.focal_px / original_width,
            scene.focal_px / HEIGHT,
            (scene.cx + left) / original_width,
            scene.cy / HEIGHT,
        ]
        matrix = np.column_stack((r, shift))
        numbers = [*intrinsics, 0, 0, *matrix.ravel()]
        lines.append(" ".join([str(77_000_000 + t * STEP_US), *(f"{number:.12g}" for number in numbers)]))
        write_image(pictures / clip / f"{77_000_000 + t * STEP_US}.png", scene.pictures[t])
    (cameras / f"{clip}.txt").write_text("\n".join(lines) + "\n")


def quaternion_wxyz(r):
    """By the largest component, as in every textbook."""
    squares = np.array(
        [
            1 + r[0, 0] + r[1, 1] + r[2, 2],
            1 + r[0, 0] - r[1, 1] - r[2, 2],
            1 - r[0, 0] + r[1, 1] - r[2, 2],
            1 - r[0, 0] - r[1, 1] + r[2, 2],
        ]
    )
    if squares.argmax() == 0:
        q = [squares[0], r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]]
    elif squares.argmax() == 1:
        q = [r[2, 1] - r[1, 2], squares[1], r[0, 1] + r[1, 0], r[0, 2] + r[2, 0]]
    elif squares.argmax() == 2:
        q = [r[0, 2] - r[2, 0], r[0, 1] + r[1, 0], squares[2], r[1, 2] + r[2, 1]]
    else:
        q = [r[1, 0] - r[0, 1], r[0, 2] + r[2, 0], r[1, 2] + r[2, 1], squares[3]]
    return np.array(q) / (2 * math.sqrt(squares.max()))


def write_colmap(scene, folder, binary=True, depth=True, model="PINHOLE"):
    """A dense workspace. Image ids run backwards, and images have keypoints, as COLMAP's have."""
    (folder / "sparse").mkdir(parents=True)
    names = [f"view_{t:03}.png" for t in range(FRAMES)]
    for name, picture in zip(names, scene.pictures, strict=True):
        write_image(folder / "images" / name, picture)
    focal = [scene.focal_px] if model == "SIMPLE_PINHOLE" else [scene.focal_px, scene.focal_px]
    parameters = [*focal, scene.cx, scene.cy] + ([0.01] * 4 if model == "OPENCV" else [])
    number = {"SIMPLE_PINHOLE": 0, "PINHOLE": 1, "OPENCV": 4}[model]
    order = list(reversed(range(FRAMES)))
    quaternions = [quaternion_wxyz(r) for r in scene.rotation]
    if binary:
        cameras = struct.pack("<QiiQQ", 1, 7, number, WIDTH, HEIGHT) + struct.pack(f"<{len(parameters)}d", *parameters)
        images = struct.pack("<Q", FRAMES)
        for t in order:
            images += struct.pack("<i7di", FRAMES - t, *quaternions[t], *scene.translation[t], 7)
            images += names[t].encode() + b"\0" + struct.pack("<Q", t) + struct.pack("<ddq", 1.5, 2.5, -1) * t
        (folder / "sparse" / "cameras.bin").write_bytes(cameras)
        (folder / "sparse" / "images.bin").write_bytes(images)
    else:
        numbers = " ".join(f"{value:.15g}" for value in parameters)
        (folder / "sparse" / "cameras.txt").write_text(f"# Camera list\n7 {model} {WIDTH} {HEIGHT} {numbers}\n")
        text = "# Image list with two lines of data per image:\n"
        for t in order:
            pose = " ".join(f"{value:.15g}" for value in (*quaternions[t], *scene.translation[t]))
            text += f"{FRAMES - t} {pose} 7 {names[t]}\n{'1.5 2.5 -1 ' * t}\n"
        (folder / "sparse" / "images.txt").write_text(text)
    if depth:
        maps = folder / "stereo" / "depth_maps"
        maps.mkdir(parents=True)
        for name, values in zip(names, scene.depth, strict=True):
            rows = np.where(np.isfinite(values), values, 0).astype("<f4").tobytes()
            (maps / f"{name}.geometric.bin").write_bytes(f"{WIDTH}&{HEIGHT}&1&".encode() + rows)


def opengl_c2w(r, t):
    """Columns: the camera's right, up, and back axes and its centre, in the world."""
    right, down, forward = r[0], r[1], r[2]
    matrix = np.eye(4)
    matrix[:3, 0], matrix[:3, 1], matrix[:3, 2], matrix[:3, 3] = right, -down, -forward, -r.T @ t
    return matrix


def write_nerfstudio(scene, folder, depth="png", **changes):
    """transforms.json; frames are listed backwards."""
    frames = []
    for t in reversed(range(FRAMES)):
        name = f"frame_{t + 1:05}"
        write_image(folder / "images" / f"{name}.png", scene.pictures[t])
        frame = {
            "file_path": f"images/{name}.png",
            "transform_matrix": opengl_c2w(scene.rotation[t], scene.translation[t]).tolist(),
        }
        if depth == "png":
            millimetres = np.where(np.isfinite(scene.depth[t]), np.round(scene.depth[t] * 1000), 0)
            write_image(folder / "depth" / f"{name}.png", millimetres.astype(np.uint16), "gray16le")
            frame["depth_file_path"] = f"depth/{name}.png"
        elif depth == "npy":
            (folder / "depth").mkdir(exist_ok=True)
            np.save(folder / "depth" / f"{name}.npy", scene.depth[t])
            frame["depth_file_path"] = f"depth/{name}.npy"
        frames.append(frame)
    document = {"w": WIDTH, "h": HEIGHT, "fl_x": scene.focal_px, "fl_y": scene.focal_px, "cx": scene.cx, "cy": scene.cy,
                "camera_model": "OPENCV", "k1": 0, "k2": 0.0, "p1": 0, "p2": 0,
                "depth_unit_scale_factor": 0.001 if depth == "png" else 1.0}  # fmt: skip
    (folder / "transforms.json").write_text(json.dumps({**document, **changes, "frames": frames}))


def intrinsic_matrix(scene):
    return np.array([[scene.focal_px, 0, scene.cx], [0, scene.focal_px, scene.cy], [0, 0, 1]])


def vggt_arrays(scene):
    """As `predictions.npz` of its demo has them."""
    return {
        "depth": scene.depth[..., None],
        "depth_conf": np.ones_like(scene.depth),
        "world_points": world_points(scene).astype(np.float32),
        "extrinsic": np.concatenate((scene.rotation, scene.translation[..., None]), axis=-1),
        "intrinsic": np.repeat(intrinsic_matrix(scene)[None], FRAMES, axis=0),
    }


def dust3r_arrays(scene):
    """As a script saves get_pts3d, get_depthmaps, get_im_poses and get_focals of its aligner."""
    poses = np.zeros((FRAMES, 4, 4))
    for t, (r, centre) in enumerate(zip(scene.rotation, centres(scene), strict=True)):
        poses[t, :3, :3], poses[t, :3, 3], poses[t, 3, 3] = r.T, centre, 1
    return {
        "pts3d": world_points(scene).astype(np.float32),
        "depths": scene.depth,
        "im_poses": poses,
        "principal_points": np.tile([scene.cx, scene.cy], (FRAMES, 1)),
        "focals": np.full((FRAMES, 1), scene.focal_px),
    }
