"""What generation asks of its network and its codec, seen by stubs that write everything down."""

import numpy as np
import torch

from fw_train.batch import Batch, Prediction
from fw_train.flow import draw_noise, shifted
from fw_train.sampling.generate import Generated, SamplerParams, decoded_frames, generate, predict_geometry
from fw_train.sampling.guidance import Guidance

LATENTS = (1, 16, 2, 4, 6)


class Recording(torch.nn.Module):
    """Keeps what it is called with; its velocity is 1 everywhere."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, batch, *, velocity, geometry):
        self.calls.append((batch, velocity, geometry))
        return Prediction(torch.ones_like(batch.latents), *[None] * 4)


def conditions():
    return Batch(torch.zeros(LATENTS), torch.zeros(1, 3, 8), control_camera=torch.ones(1, 24, 2, 32, 48))


def random_latents(seed):
    return torch.randn(LATENTS, generator=torch.Generator().manual_seed(seed))


def test_the_network_is_asked_at_the_shifted_noise_levels_and_moves_the_noise_of_the_seed():
    for shift in (1.0, 5.0):
        network = Recording()
        params = SamplerParams(4, "euler", shift, Guidance(), 3)
        latents, noise = generate(network, conditions(), torch.zeros(3, 8), params, torch.float32)
        asked = [batch.timestep.item() for batch, _, _ in network.calls]
        wanted = 1000 * shifted(torch.tensor([1, 0.75, 0.5, 0.25]), shift)
        torch.testing.assert_close(torch.tensor(asked), wanted)
        assert torch.equal(noise, draw_noise(3, torch.zeros(1, dtype=torch.int64), LATENTS[1:]))
        assert torch.equal(network.calls[0][0].latents, noise)
        torch.testing.assert_close(latents, noise - 1)


def test_geometry_sees_the_clip_with_its_own_noise_mixed_in_up_to_the_level():
    clean, noise = random_latents(1), random_latents(2)
    for level in (0.0, 0.25, 1.0):
        network = Recording()
        predict_geometry(network, conditions(), Generated(clean, noise), level, torch.float32, camera=True)
        ((batch, velocity, geometry),) = network.calls
        torch.testing.assert_close(batch.latents, (1 - level) * clean + level * noise)
        assert batch.timestep.tolist() == [1000 * level]
        assert (velocity, geometry) == (False, True)


def test_geometry_is_shown_the_camera_only_when_asked():
    shown, hidden = Recording(), Recording()
    generated = Generated(random_latents(1), random_latents(2))
    predict_geometry(shown, conditions(), generated, 0.1, torch.float32, camera=True)
    predict_geometry(hidden, conditions(), generated, 0.1, torch.float32, camera=False)
    (with_camera, _, _), (without, _, _) = *shown.calls, *hidden.calls
    assert with_camera.camera_on is None  # every sample is conditioned
    assert with_camera.control_camera.all()
    assert without.camera_on.tolist() == [False]
    assert not without.control_camera.any()


class Decoding:
    """A codec whose pictures are given."""

    def __init__(self, video):
        self.video = video

    def decode(self, latents):
        assert latents.dtype == torch.float32
        return self.video


def test_pictures_span_black_to_white_and_stay_within_a_byte():
    video = torch.tensor([-1.5, -1, -0.5, 0, 0.5, 1, 1.5]).expand(1, 3, 5, 2, 7)
    frames = decoded_frames(Decoding(video), torch.zeros(LATENTS, dtype=torch.bfloat16))
    assert (frames.shape, frames.dtype) == ((5, 2, 7, 3), np.uint8)
    assert np.unique(frames.reshape(-1, 7, 3), axis=0).tolist() == [[[v] * 3 for v in (0, 0, 64, 128, 191, 255, 255)]]
