"""What tensors are called outside this project.

original     blocks.0.self_attn.q.weight    the video transformer as Wan's authors name it
diffusers    blocks.0.attn1.to_q.weight     as diffusers' WanTransformer3DModel names it
geometry.*   geometry.pose_enc.0.weight     everything else, in both: the name in FantasyWorldModel behind a prefix
"""

from collections.abc import Iterable

from fw_train.model.wan import PATCH, WanParams
from fw_train.weights.files import CheckpointError, listing
from fw_train.weights.stage import VIDEO_PREFIX
from fw_train.weights.wan import GEOMETRY_PREFIX, Layout, to_diffusers, to_original

ROPE_POSITIONS = 1024  # for which diffusers makes its rotary table; the original network has no such limit
IMAGE_POSITIONS = 514  # CLIP tokens of two images


def exported_names(names: Iterable[str], layout: Layout) -> dict[str, str]:
    """The exported names by those of the network's parameters; an error lists what the layout has no name for."""
    exported, nameless = {}, []
    for name in names:
        try:
            exported[name] = _exported_name(name, layout)
        except CheckpointError:
            nameless.append(name)
    if nameless:
        raise CheckpointError(
            f"diffusers' WanTransformer3DModel has no place for {listing(nameless)}, which belong to the control variants "
            "of Wan; use --format original"
        )
    return exported


def network_name(name: str, layout: Layout) -> str:
    """The name of the parameter that an exported tensor belongs to."""
    if name.startswith(GEOMETRY_PREFIX):
        return name.removeprefix(GEOMETRY_PREFIX)
    return VIDEO_PREFIX + (to_original(name) if layout == "diffusers" else name)


def _exported_name(name: str, layout: Layout) -> str:
    if not name.startswith(VIDEO_PREFIX):
        return GEOMETRY_PREFIX + name
    original = name.removeprefix(VIDEO_PREFIX)
    return to_diffusers(original) if layout == "diffusers" else original


def diffusers_config(wan: WanParams) -> dict[str, object]:
    """The `config.json` from which diffusers builds the same video transformer."""
    clip = wan.inputs.clip
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, PATCH, PATCH],
        "num_attention_heads": wan.heads,
        "attention_head_dim": wan.head_dim,
        "in_channels": wan.inputs.in_channels,
        "out_channels": wan.out_dim,
        "text_dim": wan.text_dim,
        "freq_dim": wan.freq_dim,
        "ffn_dim": wan.ffn_dim,
        "num_layers": wan.layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": wan.eps,
        "image_dim": wan.clip_dim if clip else None,
        "added_kv_proj_dim": wan.dim if clip else None,
        "rope_max_seq_len": ROPE_POSITIONS,
        "pos_embed_seq_len": IMAGE_POSITIONS if wan.image_position else None,
    }
