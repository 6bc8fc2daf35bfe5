"""The demo's clips follow camera paths alone: optical flow of clips that its weights make for paths to the left and right."""

import math
from pathlib import Path

import pytest
import torch
from picture_motion import picture_motion

from fw_train.batch import Batch
from fw_train.encoders.dct import DctCodec
from fw_train.encoders.text import HashEncoder
from fw_train.inference import load_trained
from fw_train.sampling.conditions import padded_text
from fw_train.sampling.generate import SamplerParams, decoded_frames, generate
from fw_train.sampling.guidance import Guidance
from fw_train.sampling.trajectories import camera_inputs, generated_trajectory, square_pixels

DEMO = Path("outputs/demo")
SCENE = "A large red sphere and a tall blue box on a tiled floor under an open sky."  # the same for both sides
TURN, SEEDS = math.radians(40), 6
GUIDANCE = Guidance(1.0, 4.0)  # as the demo asks
MARGIN_PX = 0.07  # a frame, between left and right: measured 0.14 (docs/benchmarks.md)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (DEMO / "summary.txt").exists(), reason=f"{DEMO} holds no finished demo; make it with launch/demo.sh"
    ),
]


@pytest.fixture(scope="module")
def demo():
    weights = max((DEMO / "stage2").glob("step-*.safetensors"), key=lambda path: int(path.stem.partition("-")[2]))
    return load_trained(weights, precision="fp32")


def motion(demo, side, seed):
    """Pixels a frame that contents move to the right, where the path turns to a side."""
    data, encoder = demo.config.data, HashEncoder(demo.config.model.text_dim)
    size, frames = data.sizes_px[0], data.frames
    fractions = square_pixels(torch.tensor(math.radians(47), dtype=torch.float64), size)
    path = camera_inputs(generated_trajectory("pan", side * TURN, frames, 1.0, fractions), size)
    text, empty = (padded_text(t, data.text_tokens, demo.config.model.text_dim) for t in encoder.encode([SCENE, ""]))
    shape = (1, 16, (frames - 1) // 4 + 1, size[0] // 8, size[1] // 8)
    conditions = Batch(torch.zeros(shape), text[None], pose9=path.pose9)
    made = generate(demo.model, conditions, empty, SamplerParams(24, "euler", 1.0, GUIDANCE, seed), torch.float32)
    return picture_motion(decoded_frames(DctCodec(), made.latents)).right


def test_contents_move_against_the_camera_that_the_path_asks_for(demo):
    apart = [motion(demo, -1, seed) - motion(demo, 1, seed) for seed in range(SEEDS)]
    assert min(apart) > 0, apart
    assert sum(apart) / SEEDS > MARGIN_PX, apart
