"""Packed synthetic clips, each with another fault."""

import io
import json
import shutil

import av
import numpy as np
import torch
from data_commands import command

from data_tools import pack
from data_tools.scene_files import Settings, metadata_record, write_scene
from data_tools.scenes import sample_scene
from fw_train.camera_files import read_cameras, write_cameras
from fw_train.data.manifest import Dataset, ShardIndex, dataset_files, index_bytes, read_index, write_dataset_files
from fw_train.data.shards import write_tar
from fw_train.geometry import Cameras, invert_rigid, relative_to_first, rigid

FRAMES, HEIGHT, WIDTH = 9, 48, 64


def pack_raw(raw, out, entries):
    (raw / "metadata.json").write_text(json.dumps(entries))
    assert command(pack, raw, out, "--workers", 1, "--shard-size", 100) == 0
    return out


def settings(moving=0.0, frames=FRAMES):
    return Settings(1000, frames, ((HEIGHT, WIDTH),), 16, 5, moving, 0.0)


def scene_of(kind):
    return next(i for i in range(100) if sample_scene(5, i, 0.0, 0.0).path.kind == kind)


class RawClip:
    """The files of a raw clip, to be spoilt."""

    def __init__(self, raw, key):
        self.raw, self.key = raw, key
        self.video = raw / "videos" / f"{key}.mp4"
        self.camera_file = raw / "camera_params" / f"{key}.txt"

    def labels(self, kind, change):
        paths = sorted((self.raw / kind / self.key).iterdir())
        changed = change(np.stack([np.load(path) for path in paths]))
        for path, frame in zip(paths, changed, strict=True):
            np.save(path, frame.astype(np.float32))

    def poses(self, change):
        pose, intrinsics = read_cameras(self.camera_file)
        write_cameras(self.camera_file, Cameras(change(pose), intrinsics))

    def intrinsics(self, *factors):
        pose, intrinsics = read_cameras(self.camera_file)
        write_cameras(self.camera_file, Cameras(pose, intrinsics * torch.tensor(factors, dtype=torch.float64)))

    def frames(self, order):
        """Encodes the video again, with its frames in this order."""
        with av.open(str(self.video)) as container:
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        with av.open(str(self.video), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=16, options={"crf": "20", "threads": "1"})
            stream.height, stream.width = pictures[0].shape[:2]
            stream.pix_fmt = "yuv420p"
            for number in order:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pictures[number], format="rgb24")))
            container.mux(stream.encode())


def other_world(pose):
    """The same cameras in a world that is not the first camera's."""
    world = torch.tensor([[0.36, 0.48, -0.8, 1.0], [-0.8, 0.6, 0, -2], [0.48, 0.64, 0.6, 0.5], [0, 0, 0, 1]])
    return pose @ world.double()


def to_own_cameras(clip):
    pose = relative_to_first(read_cameras(clip.camera_file).cam_from_world).numpy()
    clip.labels("points", lambda p: np.einsum("tji,thwj->thwi", pose[:, :3, :3], p - pose[:, None, None, :3, 3]))


def to_world(clip):
    clip.poses(other_world)
    first = read_cameras(clip.camera_file).cam_from_world[0].numpy()
    clip.labels("points", lambda p: (p - first[:3, 3]) @ first[:3, :3])


def to_ray_lengths(clip):
    fx, fy, cx, cy = read_cameras(clip.camera_file).intrinsics_frac[0].tolist()
    x = ((np.arange(WIDTH) + 0.5) / WIDTH - cx) / fx
    y = ((np.arange(HEIGHT) + 0.5) / HEIGHT - cy) / fy
    clip.labels("depth", lambda d: d * np.sqrt(x**2 + y[:, None] ** 2 + 1))


def transposed(pose):
    return rigid(pose[:, :3, :3].mT, pose[:, :3, 3])


def with_centres(pose):
    return rigid(pose[:, :3, :3], invert_rigid(pose)[:, :3, 3])


def scaled(factor):
    return lambda pose: rigid(pose[:, :3, :3], factor * pose[:, :3, 3])


def opengl(pose):
    return torch.tensor([1.0, -1, -1, 1]).double()[:, None] * pose


def blank_frames(labels):
    labels[3:5] = np.nan
    return labels


def sparse(labels):
    labels[6, 1:] = np.nan
    return labels


def repeat_labels(clip):
    for kind in ("depth", "points"):
        clip.labels(kind, lambda labels: labels[[0, 1, 2, 3, 3, 3, 6, 7, 8]])


# Fault -> how to make it, what its detail says.
INJECTED = {
    "inverted": ("pose-inverted", lambda c: c.poses(invert_rigid), r"c2w.* falls from \d\d.* % to less than 0.01 %"),
    "inverted_elsewhere": ("pose-inverted", lambda c: c.poses(lambda p: invert_rigid(other_world(p))), "c2w"),
    "nerf": ("pose-inverted", lambda c: c.poses(lambda p: invert_rigid(opengl(p))), "OpenGL"),
    "transposed": ("rotation-transposed", lambda c: c.poses(transposed), "transposed"),
    "transposed_elsewhere": ("rotation-transposed", lambda c: c.poses(lambda p: transposed(other_world(p))), "transp"),
    "centre": ("translation-is-centre", lambda c: c.poses(with_centres), "-R c"),
    "opengl": ("opengl-axes", lambda c: c.poses(opengl), "the cameras have OpenGL"),
    "opengl_points": ("opengl-axes", lambda c: c.labels("points", lambda p: p * [1, -1, -1]), "the points have OpenGL"),
    "world": ("points-not-in-first-camera", to_world, "in the world's frame"),
    "own": ("points-not-in-first-camera", to_own_cameras, "own camera"),
    "divided_twice": ("wrong-intrinsics", lambda c: c.intrinsics(1 / 64, 1 / 48, 1 / 64, 1 / 48), "twice"),
    "aspect": ("wrong-intrinsics", lambda c: c.intrinsics(0.75, 1, 1, 1), "uncropped 16:9"),
    "by_width": ("wrong-intrinsics", lambda c: c.intrinsics(1, 0.75, 1, 1), "fy was divided by the width"),
    "by_height": ("wrong-intrinsics", lambda c: c.intrinsics(4 / 3, 1, 1, 1), "fx was divided by the height"),
    "swapped": ("wrong-intrinsics", lambda c: c.intrinsics(4 / 3, 3 / 4, 1, 1), "width and height are swapped"),
    "odd": ("wrong-intrinsics", lambda c: c.intrinsics(1.3, 1.3, 1.1, 1), r"the points ask for [\d.]+, [\d.]+, 0.5, 0.5"),
    "depth_scale": ("scale-mismatch", lambda c: c.labels("depth", lambda d: 3 * d), "depth is 3 times"),
    "points_scale": ("scale-mismatch", lambda c: c.labels("points", lambda p: p / 2), "points are 0.5 times"),
    "translation_scale": ("scale-mismatch", lambda c: c.poses(scaled(10)), "translations are 10 times"),
    "ray": ("wrong-depth-kind", to_ray_lengths, "along the ray"),
    "disparity": ("wrong-depth-kind", lambda c: c.labels("depth", lambda d: 2 / d + 0.1), "as affine_disparity"),
    "shifted": ("wrong-depth-kind", lambda c: c.labels("depth", lambda d: 0.5 * d + 1), "as affine_depth"),
    "nonsense": ("geometry-disagrees", lambda c: c.labels("depth", lambda d: d[:, ::-1, ::-1]), "no single mistake"),
    "jump": ("geometry-disagrees", lambda c: c.labels("points", lambda p: np.where(np.arange(9)[:, None, None, None] == 5,
                                                                           p[:, ::-1], p)), "in frame 5, of"),
    "nan_frames": ("empty-frames", lambda c: c.labels("depth", blank_frames), "no valid depth in frames 3, 4 of 9"),
    "few": ("low-coverage", lambda c: c.labels("points", sparse), r"2\.08 % of the pixels .* in frame 6"),
    "frozen": ("frozen-video", lambda c: c.frames([0, 1, 2, 3, 3, 3, 6, 7, 8]), "frames 4, 5 of 9"),
    "still": ("frozen-video", lambda c: c.frames([0] * 9), "frames 1 to 8 of 9 show"),
    "repeated": ("frozen-labels", repeat_labels, "frames 4, 5 of 9"),
    "silent": ("caption-missing", None, "empty"),
}  # fmt: skip
# In the packed members: `fw data pack` refuses them in raw folders.
CRAFTED = {
    "pixels": ("wrong-intrinsics", "camera.npy", lambda data: edit_cameras(data, intrinsics=True), "in pixels"),
    "nan_cameras": ("not-finite", "camera.npy", lambda data: edit_cameras(data, intrinsics=False), "frames 2, 3 of 9"),
    "cut": ("unreadable", "mp4", lambda data: data[: len(data) // 2], "mp4"),
}


def edit_cameras(data, intrinsics):
    table = np.load(io.BytesIO(data)).copy()
    if intrinsics:
        table[:, 12:] *= (WIDTH, HEIGHT, WIDTH, HEIGHT)
    else:
        table[2:4, 5] = np.nan
    file = io.BytesIO()
    np.save(file, table)
    return file.getvalue()


def craft(out, changes):
    """Packs a dataset of one shard again with some members changed: (key, suffix) -> function of its bytes."""
    dataset, index = Dataset(out), read_index(out, "shard-000000")
    samples = []
    for row, sample in enumerate(index.samples):
        members = dataset.read(row)
        samples.append((sample.key, {s: changes.get((sample.key, s), bytes)(data) for s, data in members.items()}))
    tar = io.BytesIO()
    facts = write_tar(tar, samples)
    (out / "shard-000000.tar").write_bytes(tar.getvalue())
    header = index.header.__class__(**{**vars(index.header), "tar_bytes": facts.bytes, "tar_sha256": facts.sha256})
    new = ShardIndex(header, facts.samples, index.rejects)
    (out / "shard-000000.index.jsonl").write_bytes(index_bytes(new))
    write_dataset_files(out, dataset_files([new]))


def copy_clip(source, raw, key):
    """A copy of the only clip of a raw folder under another name."""
    for part in ("videos", "camera_params", "depth", "points"):
        (raw / part).mkdir(parents=True, exist_ok=True)
        (path,) = (source / part).iterdir()
        (shutil.copytree if path.is_dir() else shutil.copy)(path, raw / part / f"{key}{path.suffix}")
    return RawClip(raw, key)


def render(folder, kind, **options):
    """A raw folder with the first scene of a kind, and its metadata."""
    made = settings(**options)
    write_scene(folder, made, scene_of(kind))
    shutil.rmtree(folder / ".unfinished")
    return metadata_record(made, scene_of(kind))


def make_faulty(folder, keys):
    """Packs copies of one clip, spoilt as the keys say, and a clip `healthy` whose `twin` has the same video."""
    entry = render(folder / "source", "orbit")
    entries = []
    for number, key in enumerate(keys):
        clip = copy_clip(folder / "source", folder / "raw", key)
        if key in INJECTED and INJECTED[key][1]:
            INJECTED[key][1](clip)
        with open(clip.video, "ab") as file:  # a box that means nothing, so that no two files are the same
            file.write(b"\0\0\0\x0cfree" + (keys.index("healthy") if key == "twin" else number).to_bytes(4))
        entries.append({**entry, "id": key, "caption": "" if key == "silent" else f"a scene, {key}"})
    out = pack_raw(folder / "raw", folder / "out", entries)
    craft(out, {(key, suffix): change for key, (_, suffix, change, _) in CRAFTED.items()})
    return out
