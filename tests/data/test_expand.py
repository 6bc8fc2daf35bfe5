"""What reaches a step: labels, cameras and video agree with the raw clip, whatever the view."""

import numpy as np
import pytest
import torch
from packed_clips import make_packed
from raw_clips import clip_labels

from fw_train.data.loader import (
    Augmentation,
    LoaderParams,
    SourceParams,
    TrainingData,
    expand_batch,
    expand_video,
)
from fw_train.geometry import decode_pose9, intrinsics_px, pack_plucker, plucker_rays, transform_points

EVERYTHING = Augmentation(random_crop=True, max_temporal_stride=3, flip=0.5, colour_jitter=0.2)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    clips = ((2, 32, 48, 21), (1, 48, 32, 21))
    return make_packed(tmp_path_factory.mktemp("expand"), clips, kinds=("latent", "text", "image", "clip"))


def open_data(folder, **changes):
    given = {"frames": 21, "sizes_px": ((32, 48), (48, 32)), "latents": "sidecar", "members": ("latent", "text")}
    return TrainingData(
        [SourceParams(str(folder))], LoaderParams(**{**given, "text_tokens": 4, "workers": 0, **changes}), 0
    )


ONLINE = {"latents": "online", "members": ("text",), "video": True}


def expanded(data, rows, positions=None, **changes):
    coded = data.sample_batch(0, rows, positions or list(range(len(rows))))
    latents = torch.zeros(len(rows), 16, 1, 2, 2) if not coded.samples[0].encoded.get("latent") is not None else None
    return coded, expand_batch(coded, "cpu", torch.float32, latents=latents, **changes)


def test_a_whole_clip_comes_out_as_it_went_in(packed):
    data = open_data(packed, members=("latent", "text", "image", "clip"))
    coded, batch = expanded(data, [0, 1], [7, 3], control_camera=True)
    depth, points, cameras = clip_labels(21, 32, 48)
    scale = np.linalg.norm(points.astype(np.float64), axis=-1).mean()
    assert batch.valid.all()
    assert torch.allclose(batch.depth[0], torch.from_numpy(depth / scale).float(), rtol=6e-4)
    assert torch.allclose(batch.points[1], torch.from_numpy(np.moveaxis(points, -1, 1) / scale).float(), atol=2e-3)
    assert batch.points.norm(dim=2).mean(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1], abs=1e-5)
    poses, fov = decode_pose9(batch.pose9.double())
    assert torch.allclose(poses[0, :, 0, 3] * scale, 0.1 * torch.arange(21).double(), atol=2e-3)
    assert fov[0, 0].item() == pytest.approx(2 * np.arctan(32 / 48 / 1.2 / 2), abs=1e-5)
    rays = plucker_rays(poses, intrinsics_px(cameras.intrinsics_frac, 32, 48), 32, 48)
    assert torch.allclose(batch.control_camera, pack_plucker(rays).float(), atol=1e-4)
    assert (batch.keys, batch.position.tolist(), batch.depth_kind) == (("a0", "a1"), [7, 3], ("metric", "metric"))
    assert coded.captions == ("a tilted wall, a0", "a tilted wall, a1")
    assert [sample.fps for sample in coded.samples] == [8, 16]
    for tensor, shape in (
        (batch.latents, (2, 16, 6, 4, 6)),
        (batch.image_latents, (2, 16, 6, 4, 6)),
        (batch.clip, (2, 5, 8)),
        (batch.text, (2, 4, 8)),
    ):
        assert tensor.shape == shape
        assert (tensor[0] == 0).all()
    assert (batch.text[1].sum(-1) != 0).tolist() == [True, True, True, False]
    assert (batch.latents[1] == 1).all()


def test_dtypes(packed):
    data = open_data(packed, members=("latent", "text", "image", "clip"))
    coded = data.sample_batch(0, [2], [0])
    batch = expand_batch(coded, "cpu", torch.bfloat16, control_camera=True)
    assert batch.latents.shape == (1, 16, 6, 6, 4)
    inputs = batch.latents, batch.text, batch.clip, batch.image_latents, batch.control_camera
    assert {tensor.dtype for tensor in inputs} == {torch.bfloat16}
    assert {tensor.dtype for tensor in (batch.pose9, batch.depth, batch.points)} == {torch.float32}
    assert (batch.valid.dtype, batch.position.dtype) == (torch.bool, torch.int64)


def test_fewer_frames_are_the_first_of_pixels_and_latents(packed):
    _, whole = expanded(open_data(packed), [0])
    _, cut = expanded(open_data(packed, frames=9), [0])
    assert cut.latents.shape == (1, 16, 3, 4, 6)
    ratio = (whole.depth[0, 0, 0, 0] / cut.depth[0, 0, 0, 0]).item()
    assert ratio != pytest.approx(1, abs=1e-3)  # the scale is of what is seen
    assert torch.allclose(cut.depth[0] * ratio, whole.depth[0, :9], rtol=1e-5)
    assert torch.allclose(cut.points[0] * ratio, whole.points[0, :9], rtol=1e-5)
    moments = cut.pose9[0].clone()
    moments[:, 3:7] *= ratio
    assert torch.allclose(moments, whole.pose9[0, :9], atol=1e-5)
    assert cut.points.norm(dim=2).mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("position", range(12))
def test_points_are_the_unprojected_depth_from_any_view(packed, position):
    """Cameras, depth and points of a sample agree: so nothing was mirrored, cut, scaled or moved without the rest."""
    data = open_data(packed, frames=5, sizes_px=((16, 16),), augmentation=EVERYTHING, **ONLINE)
    dataset = data.sources[0].dataset
    coded, batch = expanded(data, [dataset.find("b0")], [position])
    view = coded.samples[0].view
    assert view.crop.window[2:] == (32, 32)
    poses, fov = decode_pose9(batch.pose9[0].double())
    cameras = coded.samples[0].labels.cameras
    assert fov[0].item() == pytest.approx(2 * np.arctan(1 / 2 / cameras.intrinsics_frac[0, 1].item()), abs=1e-5)
    # Two old pixels make one; the nearer of them lies a quarter of a new pixel off its centre.
    pixels = intrinsics_px(cameras.intrinsics_frac, 16, 16)
    seen = transform_points(torch.linalg.inv(poses), batch.points[0].double())
    u = seen[:, 0] / seen[:, 2] * pixels[:, 0, None, None] + pixels[:, 2, None, None]
    v = seen[:, 1] / seen[:, 2] * pixels[:, 1, None, None] + pixels[:, 3, None, None]
    columns, rows = torch.arange(16) + 0.5, torch.arange(16)[:, None] + 0.5
    assert (u - columns).abs().max() < 0.27
    assert (v - rows).abs().max() < 0.27
    assert torch.allclose(seen[:, 2].float(), batch.depth[0], rtol=2e-3)
    assert batch.points.norm(dim=2).mean().item() == pytest.approx(1, abs=1e-4)
    # The wall slopes to the right: mirrored, it slopes to the left, and the camera moves to the left.
    assert (batch.depth[0, 0, 0, -1] < batch.depth[0, 0, 0, 0]) == view.flipped
    assert (poses[-1, 0, 3] < 0) == view.flipped


def test_video_is_seen_as_its_labels_are(packed):
    plain = open_data(packed, **ONLINE)
    row = plain.sources[0].dataset.find("a1")
    (whole,) = expand_video(plain.sample_batch(0, [row], [0]), "cpu")
    assert whole.shape == (21, 3, 32, 48)
    data = open_data(packed, frames=5, augmentation=EVERYTHING, sizes_px=((32, 32),), **ONLINE)
    flips = set()
    for position in range(8):
        coded = data.sample_batch(0, [row], [position])
        view = coded.samples[0].view
        flips.add(view.flipped)
        _, left, _, width = view.crop.window
        seen = whole[list(view.frames)][..., left : left + width]
        colours = view.colours
        wanted = torch.einsum("cp,tphw->tchw", colours[:, :3], seen) + colours[:, 3, None, None]
        inside = (
            (seen.abs() < 0.99).all(dim=1, keepdim=True).expand_as(seen)
        )  # `whole` is cut off outside, `found` is not
        assert inside.float().mean() > 0.2
        if view.flipped:
            wanted, inside = wanted.flip(-1), inside.flip(-1)
        (found,) = expand_video(coded, "cpu")
        assert (found - wanted.clamp(-1, 1))[inside].abs().max() < 1e-5
    assert flips == {True, False}


def test_video_is_scaled_to_the_size(packed):
    data = open_data(packed, sizes_px=((16, 32),), **ONLINE)
    coded = data.sample_batch(0, [0], [0])
    assert coded.samples[0].video.y.shape == (21, 24, 48)
    assert expand_video(coded, "cpu").shape == (1, 21, 3, 16, 32)
    _, batch = expanded(data, [0])
    assert batch.depth.shape == (1, 21, 16, 32)


def test_what_is_not_there_is_named(packed):
    data = open_data(packed, labels=False)
    coded = data.sample_batch(0, [0], [0])
    batch = expand_batch(coded, "cpu", torch.float32)
    assert batch.depth is batch.points is batch.pose9 is batch.valid is None
    with pytest.raises(ValueError, match="need cameras; ask the loader for labels"):
        expand_batch(coded, "cpu", torch.float32, control_camera=True)
    with pytest.raises(ValueError, match="no video in this batch"):
        expand_video(coded, "cpu")
    online = open_data(packed, **ONLINE).sample_batch(0, [0], [0])
    with pytest.raises(ValueError, match="needs latents and text"):
        expand_batch(online, "cpu", torch.float32)


def test_rows_of_two_streams_are_no_batch(packed):
    data = open_data(packed)
    with pytest.raises(ValueError, match="rows .* of source 0 are not in one stream"):
        data.sample_batch(0, [0, 2], [0, 1])
