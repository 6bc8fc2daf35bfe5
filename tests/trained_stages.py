"""What runs leave without having run: a base, and weights of each stage that no fresh network has, with their configuration."""

import torch
from safetensors.torch import save_file
from tiny_training import write_config as write_tiny

from fw_train.build import base_identity, on_meta, trainable_shapes, world_params
from fw_train.config import config_hash, load_config
from fw_train.inference import write_config
from fw_train.model.wan import WanDiT
from fw_train.model.world import FantasyWorldModel
from fw_train.precision import PRECISIONS
from fw_train.weights.stage import StageInfo, write_stage_weights
from fw_train.weights.wan import to_diffusers

ENCODINGS = {"latent": {"codec": "dct", "version": 1}, "text": {"encoder": "hash:8", "version": 2}}


def random_base(path, wan, dtype=torch.float32, layout="original", seed=0):
    """A Wan checkpoint without zeros or ones that would hide a mix-up."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: p.shape for name, p in on_meta(lambda: WanDiT(wan), dtype).named_parameters()}
    state = {name: (0.2 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({to_diffusers(name) if layout == "diffusers" else name: t for name, t in state.items()}, path)
    return state


def trained(folder, stage, model=None, precision="fp32", **weights):
    """step-3.safetensors of a run of `stage`, every weight of which is random, zero gates included."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = {"train": {"stage": stage, "precision": precision}, "weights": {k: str(v) for k, v in weights.items()}}
    if "widen_input" in weights:
        sections["weights"]["widen_input"] = weights["widen_input"]
    config = load_config(write_tiny(folder / "given.yaml", "data", folder, **sections, model=model or {}))
    dtype = PRECISIONS[precision].params
    network = on_meta(lambda: FantasyWorldModel(world_params(config)), dtype)
    generator = torch.Generator().manual_seed(len(stage) + 7)
    tensors = {
        name: (0.2 * torch.randn(info.shape, generator=generator)).to(dtype)
        for name, info in trainable_shapes(network, stage).items()
    }
    path = folder / "step-3.safetensors"
    info = StageInfo(stage, 3, config_hash(config), base_identity(config), dtype, ENCODINGS)
    write_stage_weights(path, tensors, info)
    write_config(folder, config)
    return path


def tiny_wan_of(folder, **model):
    """Parameters of the video transformer that `trained` uses."""
    path = write_tiny(folder / "wan.yaml", "data", folder, model=model)
    return world_params(load_config(path)).wan
