import torch

from fw_train.model.camera import CameraHead, PoseEncoder, pool_frames, upsampling_weights


def test_poses_are_pooled_as_the_vae_groups_frames():
    x = torch.arange(9.0).view(1, 9, 1)
    assert pool_frames(x).flatten().tolist() == [0.0, 2.5, 6.5]
    assert pool_frames(x[:, :1]).flatten().tolist() == [0.0]


def test_time_upsampling_restores_what_is_linear_in_time():
    """Latent frames stand for the means of their pixel frames: a linear motion comes back, up to the constant end."""
    motion = torch.arange(17.0)
    latent = pool_frames(motion.view(1, 17, 1)).flatten()
    restored = upsampling_weights(5, torch.device("cpu")) @ latent
    torch.testing.assert_close(restored[:15], motion[:15])
    assert restored[15:].tolist() == [14.5, 14.5]


def test_upsampling_weights_sum_to_one_and_serve_a_single_frame():
    weights = upsampling_weights(21, torch.device("cpu"))
    assert weights.shape == (81, 21)
    torch.testing.assert_close(weights.sum(1), torch.ones(81))
    assert weights.min() >= 0
    assert upsampling_weights(1, torch.device("cpu")).tolist() == [[1.0]]


def test_poses_are_encoded_in_fp32_in_a_bf16_network():
    encoder = PoseEncoder(16).to(torch.bfloat16)
    pose = torch.zeros(1, 5, 9)
    pose[..., 8] = 1.0
    moved = pose.clone()
    moved[..., 8] += 1e-3  # less than bf16 resolves at 1
    assert not torch.equal(encoder(pose), encoder(moved))
    assert encoder(pose).dtype == torch.float32


def test_a_fresh_camera_head_says_that_no_camera_has_moved():
    head = CameraHead(32)
    cameras = head(torch.zeros(2, 32), torch.zeros(2, 3, 32))
    expected = torch.tensor([0, 0, 1, 0, 0, 0, 0, 0, 1.0]).expand(2, 9, 9)
    torch.testing.assert_close(cameras, expected, atol=0.02, rtol=0)
