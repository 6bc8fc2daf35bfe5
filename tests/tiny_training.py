"""A configuration and data for runs of a second: every part of the network at its smallest, a dozen clips of noise."""

import yaml
from packed_clips import pack_arguments
from raw_clips import write_clip, write_metadata
from sidecars import make_sidecar, noise_facts, noise_tensor

from data_tools import pack
from fw_train.data.manifest import Dataset

MODEL = {
    "variant": "t2v", "dim": 24, "ffn_dim": 32, "heads": 2, "layers": 5, "text_dim": 8, "freq_dim": 16, "split_layer": 1,
    "bridge_heads": 2, "bridge_layers": 1, "register_tokens": 1, "cross_width": 24, "cross_heads": 2, "taps": [0, 1, 2, 3],
    "head_features": 8, "head_channels": [8, 8, 8, 8], "head_chunk_frames": 2,
}  # fmt: skip


def make_data(folder, clips=12, frames=5, height=32, width=48, seed=0):
    """A packed dataset with noise for latents and texts."""
    raw, out = folder / "raw", folder / "packed"
    keys = [f"clip{number:02}" for number in range(clips)]
    write_metadata(raw, [write_clip(raw, key, frames=frames, height=height, width=width) for key in keys])
    assert pack.run(pack_arguments(raw, out)) == 0
    dataset = Dataset(out)
    for kind in ("latent", "text"):
        make_sidecar(dataset, kind, noise_facts(kind), lambda kind, row, shape: noise_tensor(kind, seed + row, shape))
    return out


def write_config(path, data, output, /, **sections):
    """A YAML file; `sections` as train={"steps": 3} change it."""
    tree = {
        "model": dict(MODEL),
        "data": {
            "sources": [{"path": str(data)}], "frames": 5, "sizes_px": [[32, 48]],
            "text_tokens": 4, "workers": 0,
        },
        "loss": {"chamfer_points": 128},
        "train": {
            "stage": "stage1", "steps": 8, "global_batch": 4, "micro_batch": 1, "learning_rate": 1e-3, "precision": "fp32",
            "activation_checkpointing": "none", "warmup_steps": 3, "diffusion_every_steps": 3,
        },
        "run": {
            "output": str(output), "save_every_steps": 3, "log_every_steps": 1, "validation_samples": 2,
            "validate_every_steps": 0, "log_pictures_every": 0,
        },
        "guard": {"hang_s": 20, "first_step_s": 60, "collective_s": 60, "agree_every_steps": 2},
    }  # fmt: skip
    for name, section in sections.items():
        tree.setdefault(name, {}).update(section)
    path.write_text(yaml.safe_dump(tree))
    return path
