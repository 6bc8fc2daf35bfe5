"""What a run's monitor is told: facts from the configuration, and the scene that its pictures show."""

import resource
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from fw_train.batch import Batch
from fw_train.build import world_params
from fw_train.config import Config, to_tree, to_yaml
from fw_train.dist import World
from fw_train.evaluation.scenes import scene
from fw_train.evaluation.validation import JUDGED_LEVEL, predict
from fw_train.flops import Shape, peak_flops, sample_flops, total_flops
from fw_train.monitoring.monitor import Monitor, silent_monitor
from fw_train.monitoring.step_figures import RunFacts
from fw_train.pictures.scene import Scene
from fw_train.run.allowed_changes import flattened
from fw_train.step import StepParams


def open_monitor(output: Path, config: Config, world: World, version: str, first_step: int) -> Monitor:
    """The monitor of rank 0, which writes, or a silent one."""
    if world.rank != 0:
        return silent_monitor()
    facts = run_facts(config, world, version)
    return Monitor(output, facts, log_every_steps=config.run.log_every_steps, stream=sys.stderr, first_step=first_step)


def run_facts(config: Config, world: World, version: str) -> RunFacts:
    """What does not change during a run."""
    data, train = config.data, config.train
    shapes = [Shape(data.frames, height, width, data.text_tokens) for height, width in data.sizes_px]
    share = 1 / train.diffusion_every_steps if train.stage == "stage1" else 1.0  # of steps that compute a velocity
    params = world_params(config)

    def flops(shape: Shape) -> float:
        full, usual = (total_flops(sample_flops(params, shape, train.stage, velocity)) for velocity in (True, False))
        return share * full + (1 - share) * usual

    peak = config.run.peak_tflops * 1e12
    if not peak and world.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(world.device)) or 0.0
    leaves = {name: value for name, value in flattened(to_tree(config)).items() if isinstance(value, int | float | str)}
    return RunFacts(
        total_steps=train.steps,
        global_batch=train.global_batch,
        world_size=world.size,
        flops_per_sample=sum(map(flops, shapes)) / len(shapes),
        tokens_per_sample=round(sum(_tokens(shape) for shape in shapes) / len(shapes)),
        peak_flops_per_gpu=peak or None,
        config_text=to_yaml(config),
        code_version=version,
        hparams=leaves,
    )


def scene_of(module: nn.Module, batch: Batch, video: Tensor, params: StepParams) -> Scene:
    """The middle frame of a clip as it is and as the network sees it at the judged noise level, the camera hidden.

    `batch` has one clip, `video` [1, T, 3, H, W] in [-1, 1]; sharded engines need all ranks for the forward pass.
    """
    with torch.no_grad():
        prediction = predict(module, batch, JUDGED_LEVEL, params.seed, params.dtype, camera=False)
    return scene(prediction, batch, video)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: of the GPU, or of the host where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _tokens(shape: Shape) -> int:
    frames, rows, columns = shape.grid
    return frames * rows * columns
