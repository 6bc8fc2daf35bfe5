import pytest
import torch

from data_tools.scene_render import render_colour
from data_tools.scenes import sample_scene, surfaces_at, views
from fw_train.encoders import dct
from fw_train.encoders.latents import first_frame_video, load_latent_codec

CODEC = load_latent_codec("dct")


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def clip():
    """A rendered clip [1, 3, 9, 64, 96]."""
    scene, frames = sample_scene(3, 1, moving=1.0, sky=0.0), []
    for t, view in enumerate(views(scene, 9, 16, 64, 96)):
        frames.append(torch.from_numpy(render_colour(surfaces_at(scene, t / 8, t / 16), scene.light, view)))
    return torch.stack(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1


def test_latents_have_the_shape_of_wans():
    for frames, latent in ((1, 1), (5, 2), (17, 5), (41, 11)):
        latents = CODEC.encode(noise(2, 3, frames, 16, 24))
        assert latents.shape == (2, 16, latent, 2, 3)
        assert latents.dtype == torch.float32
        assert CODEC.decode(latents).shape == (2, 3, frames, 16, 24)


def test_other_sizes_are_refused():
    for frames, height, width in ((4, 16, 16), (5, 12, 16), (5, 16, 20)):
        with pytest.raises(ValueError, match=f"{frames} frames of {height}x{width}; 4k"):
            CODEC.encode(noise(1, 3, frames, height, width))


def test_a_decoded_scene_looks_like_the_original(clip):
    decoded = CODEC.decode(CODEC.encode(clip))
    psnr = 10 * torch.log10(4 / (decoded - clip).square().mean(dim=(0, 1, 3, 4)))
    assert (psnr > 22).all(), psnr  # blurred; a frame of the middle colour gets 10
    assert psnr[0] > 24
    assert decoded.abs().max() <= 1


def test_latents_have_about_unit_variance(clip):
    latents = CODEC.encode(clip)[0].flatten(1)
    assert 0.3 < latents.std() < 2
    assert latents.mean().abs() < 0.5


def test_what_comes_later_changes_no_earlier_latent():
    video = noise(1, 3, 25, 8, 8)
    latents = CODEC.encode(video)
    for kept in range(1, 7):
        changed = video.clone()
        changed[:, :, 4 * (kept - 1) + 1 :] = 0.3
        found = CODEC.encode(changed)
        assert torch.equal(found[:, :, :kept], latents[:, :, :kept])
        assert kept == 7 or not torch.allclose(found[:, :, kept:], latents[:, :, kept:])


def test_chunks_change_nothing(monkeypatch):
    video = noise(1, 3, 37, 8, 16)
    latents = CODEC.encode(video)
    decoded = CODEC.decode(latents)
    monkeypatch.setattr(dct, "CHUNK", 1)
    torch.testing.assert_close(CODEC.encode(video), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(CODEC.decode(latents), decoded, rtol=1e-5, atol=1e-5)


def test_the_codec_projects_orthogonally():
    """Latents of a decoded video are its latents again, and the kept rows are orthonormal."""
    for transform in (CODEC._first, CODEC._later):
        torch.testing.assert_close(transform.basis @ transform.basis.T, torch.eye(16), rtol=0, atol=1e-5)
    latents = 0.05 * torch.randn(1, 16, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(CODEC.encode(CODEC.decode(latents)), latents, rtol=0, atol=1e-4)


def test_the_numbers_are_fixed():
    """Latents on disk depend on them: other numbers need another version in the fingerprint."""
    ramp = torch.linspace(-1, 1, 3 * 5 * 8 * 8).reshape(1, 3, 5, 8, 8)
    latents = CODEC.encode(ramp)[0, :, :, 0, 0]
    assert CODEC.fingerprint_facts == {"codec": "dct", "version": 1}
    wanted = torch.tensor(GOLDEN).T
    torch.testing.assert_close(latents[[0, 1, 2, 3, 4, 11, 15]], wanted, rtol=1e-4, atol=1e-4)


def test_encoding_keeps_no_graph_and_no_input(clip):
    video = clip.clone().requires_grad_()
    assert not CODEC.encode(video).requires_grad
    assert torch.equal(video.detach(), clip)


def test_the_first_frame_is_followed_by_zeros():
    frame = noise(2, 3, 8, 8)
    video = first_frame_video(frame, 5)
    assert video.shape == (2, 3, 5, 8, 8)
    assert torch.equal(video[:, :, 0], frame)
    assert not video[:, :, 1:].any()


GOLDEN = [
    [-1.59466, -4.47241, 0.00000, -0.52656, -0.09751, -0.00000, -0.00000],
    [-0.42412, -4.47241, -0.00000, -0.52656, -0.09751, -2.94649, -0.00000],
]
