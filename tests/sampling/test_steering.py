"""A camera path steers the video: a small network learns to pan, and is then asked to pan both ways.

Two rendered scenes, each seen by a camera that pans to the left and by one that pans to the right. The video branch learns all
clips without a camera, so it cannot know which way to go; then it is frozen, and what stage 2 trains learns to tell it, with the
camera dropped now and then. Sampled with noise that it has not seen, contents have to move against the camera.
"""

import math

import numpy as np
import pytest
import torch
from picture_motion import picture_motion

from data_tools.scene_render import View, render_colour
from data_tools.scenes import sample_scene, surfaces_at, views
from fw_train.batch import Batch
from fw_train.build import build_model
from fw_train.encoders.dct import DctCodec
from fw_train.model.heads import DenseHeadParams
from fw_train.model.wan import WanParams
from fw_train.model.world import WorldParams
from fw_train.sampling.generate import SamplerParams, decoded_frames, generate
from fw_train.sampling.guidance import Guidance
from fw_train.sampling.trajectories import camera_inputs, generated_trajectory, square_pixels
from fw_train.stages import match_rules, stage_rules
from fw_train.step import StepParams, noised_batch
from fw_train.weights.wan import seed_geometry

SIZE, FRAMES, TURN = (32, 48), 5, 0.3
SCENES, SEEDS = 2, 3
VIDEO_STEPS, CAMERA_STEPS, SHIFT = 200, 120, 3.0  # most noise levels are high, where left and right part
FRACTIONS = square_pixels(torch.tensor(math.radians(45), dtype=torch.float64), SIZE)
TEXT = torch.eye(4, 8)  # the same for all clips: words tell nothing
MARGIN_PX = 0.15  # a frame, between left and right: measured 0.4 after so short a training, 8.4 in the rendered clips


def path(turn):
    return generated_trajectory("pan", turn, FRAMES, 1.0, FRACTIONS)


def rendered(number, turn):
    """Frames [T, H, W, 3] of a scene."""
    scene = sample_scene(0, number, moving=0, sky=0)
    first = views(scene, 2, 16, *SIZE)[0]
    poses = (first.stage_from_cam @ pose for pose in path(turn).first_from_cam.numpy())
    return np.stack(
        [render_colour(surfaces_at(scene, 0, 0), scene.light, View(pose, first.focal_px, *SIZE)) for pose in poses]
    )


def learn(network, parameters, data, stage, steps, learning_rate):
    """Diffusion training on noise and drops of the trainer's own."""
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0)
    params = StepParams(stage, torch.float32, shift=SHIFT, text_drop=0.0)
    clips = len(data.latents)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 20) * (1 - step / steps)
        batch = Batch(
            data.latents.repeat(2, 1, 1, 1, 1), data.text.repeat(2, 1, 1), pose9=data.pose9.repeat(2, 1, 1),
            position=torch.arange(2 * clips) + 2 * clips * step,
        )  # fmt: skip
        noisy, target = noised_batch(batch, params, TEXT)
        velocity = network(noisy)
        loss = (velocity - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()


@pytest.fixture(scope="module")
def trained():
    turns = [side * TURN for side in (-1, 1)] * SCENES
    frames = [rendered(number // 2, turn) for number, turn in enumerate(turns)]
    video = torch.from_numpy(np.stack(frames)).permute(0, 4, 1, 2, 3) / 127.5 - 1
    pose9 = torch.cat([camera_inputs(path(turn), SIZE).pose9 for turn in turns])
    data = Batch(DctCodec().encode(video), TEXT.expand(len(turns), -1, -1), pose9=pose9)
    params = WorldParams(
        WanParams("t2v", dim=64, ffn_dim=128, heads=2, layers=5, text_dim=8, freq_dim=64),
        DenseHeadParams(64, 8, (8, 8, 8, 8), 2),
        interaction=True,
        split_layer=1,
        bridge_heads=2,
        bridge_layers=1,
        cross_width=48,
        cross_heads=2,
        taps=(0, 1, 2, 3),
    )
    model = build_model(params, torch.float32, seed=0)
    learn(model.video, list(model.video.parameters()), data, "stage0", VIDEO_STEPS, 4e-3)
    seed_geometry(model)
    rules = match_rules(dict(model.named_parameters()), stage_rules("stage2"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rules[name].trainable)
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    learn(lambda batch: model(batch, geometry=False).velocity, trains, data, "stage2", CAMERA_STEPS, 6e-3)
    return model.eval().requires_grad_(False)


def motion(model, turn, seed):
    """Pixels a frame that contents move to the right."""
    inputs = camera_inputs(path(turn), SIZE)
    shape = (1, 16, (FRAMES - 1) // 4 + 1, SIZE[0] // 8, SIZE[1] // 8)
    conditions = Batch(torch.zeros(shape), TEXT[None], pose9=inputs.pose9)
    params = SamplerParams(12, "euler", SHIFT, Guidance(), seed)
    return picture_motion(
        decoded_frames(DctCodec(), generate(model, conditions, TEXT, params, torch.float32).latents)
    ).right


@pytest.mark.slow
def test_contents_move_against_the_camera_that_is_asked_for(trained):
    found = [[motion(trained, side * TURN, seed) for side in (-1, 1)] for seed in range(SEEDS)]
    apart = [left - right for left, right in found]
    assert min(apart) > 0, found
    assert sum(apart) / SEEDS > MARGIN_PX, found
