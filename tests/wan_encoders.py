"""Tiny random encoders, saved in the layouts of the original and of diffusers."""

import re

import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "ball", "&", "on", "floor"]
PARTS = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}


def tiny_vae():
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=8, z_dim=16).eval()


def tiny_umt5():
    torch.manual_seed(1)
    config = UMT5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    return UMT5EncoderModel(config).to(torch.bfloat16).eval()


def tiny_clip():
    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    )
    return CLIPVisionModel(config).eval()


def save_tokeniser(folder):
    tokeniser = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokeniser.pre_tokenizer = Whitespace()
    tokeniser.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokeniser, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


def save_diffusers(folder):
    """`vae/`, `text_encoder/`, `tokenizer/`, `image_encoder/`."""
    tiny_vae().save_pretrained(folder / "vae")
    tiny_umt5().save_pretrained(folder / "text_encoder")
    tiny_clip().save_pretrained(folder / "image_encoder")
    save_tokeniser(folder / "tokenizer")


def save_original(folder):
    """Three torch files and `google/umt5-xxl/`."""
    folder.mkdir(exist_ok=True)
    torch.save(original_vae(tiny_vae().state_dict()), folder / "Wan2.1_VAE.pth")
    torch.save(original_umt5(tiny_umt5().state_dict()), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    name = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    torch.save(original_clip(tiny_clip().state_dict()), folder / name)
    save_tokeniser(folder / "google/umt5-xxl")


def original_vae(state):
    """Names as in the original's code: an encoder and a decoder of `nn.Sequential`s."""
    found = {}
    for name, tensor in state.items():
        name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", name)
        name = re.sub(r"\.(norm1|conv1|norm2|conv2)\.", lambda m: f".{PARTS[m[1]]}.", name)
        for new, old in (
            ("post_quant_conv", "conv2"),
            ("quant_conv", "conv1"),
            ("down_blocks", "downsamples"),
            ("mid_block.resnets.0", "middle.0"),
            ("mid_block.attentions.0", "middle.1"),
            ("mid_block.resnets.1", "middle.2"),
            ("conv_shortcut", "shortcut"),
            ("norm_out", "head.0"),
            ("conv_out", "head.2"),
            ("conv_in", "conv1"),
        ):
            name = name.replace(new, old)
        found[name] = tensor
    return found


def original_umt5(state):
    found = {"token_embedding.weight": state["shared.weight"], "norm.weight": state["encoder.final_layer_norm.weight"]}
    for block in range(2):
        old, new = f"blocks.{block}.", f"encoder.block.{block}."
        for name in "qkvo":
            found[f"{old}attn.{name}.weight"] = state[f"{new}layer.0.SelfAttention.{name}.weight"]
        bias = state[f"{new}layer.0.SelfAttention.relative_attention_bias.weight"]
        found[f"{old}pos_embedding.embedding.weight"] = bias
        for part, place in (("gate.0", "wi_0"), ("fc1", "wi_1"), ("fc2", "wo")):
            found[f"{old}ffn.{part}.weight"] = state[f"{new}layer.1.DenseReluDense.{place}.weight"]
        for number in (1, 2):
            found[f"{old}norm{number}.weight"] = state[f"{new}layer.{number - 1}.layer_norm.weight"]
    return found


def original_clip(state):
    state = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    found = {
        "log_scale": torch.zeros(()),
        "textual.token_embedding.weight": torch.zeros(4, 4),
        "visual.head": torch.zeros(160, 8),
        "visual.cls_embedding": state["embeddings.class_embedding"][None, None],
        "visual.pos_embedding": state["embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": state["embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        found[f"visual.pre_norm.{kind}"] = state[f"pre_layrnorm.{kind}"]
        found[f"visual.post_norm.{kind}"] = state[f"post_layernorm.{kind}"]
        for n in range(3):
            old, new = f"visual.transformer.{n}.", f"encoder.layers.{n}."
            parts = [state[f"{new}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{old}attn.to_qkv.{kind}"] = torch.cat(parts)
            for place, name in (
                ("attn.proj", "self_attn.out_proj"),
                ("norm1", "layer_norm1"),
                ("norm2", "layer_norm2"),
                ("mlp.0", "mlp.fc1"),
                ("mlp.2", "mlp.fc2"),
            ):
                found[f"{old}{place}.{kind}"] = state[f"{new}{name}.{kind}"]
    return found
