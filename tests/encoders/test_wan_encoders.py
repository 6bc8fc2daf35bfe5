import sys

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from wan_encoders import (
    original_clip,
    original_umt5,
    original_vae,
    save_diffusers,
    save_original,
    tiny_clip,
    tiny_umt5,
    tiny_vae,
)

from fw_train.encoders.clip import DEVIATION, MEAN, load_image_encoder
from fw_train.encoders.latents import load_latent_codec
from fw_train.encoders.text import load_text_encoder
from fw_train.encoders.umt5 import clean
from fw_train.weights.files import CheckpointError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    save_original(folder / "original")
    save_diffusers(folder / "diffusers")
    return folder


LAYOUTS = ("original", "diffusers")


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_both_layouts_have_one_fingerprint(folders):
    for load in (load_latent_codec, load_text_encoder, load_image_encoder):
        original, diffusers = (load(folders / layout).fingerprint_facts for layout in LAYOUTS)
        assert original == diffusers
        assert len(original["weights"]) == 64


@pytest.mark.parametrize("layout", LAYOUTS)
def test_latents_are_the_normalised_mean_of_the_posterior(folders, layout):
    codec, vae = load_latent_codec(folders / layout), tiny_vae()
    video = noise(1, 3, 9, 16, 24)
    latents = codec.encode(video)
    assert latents.shape == (1, 16, 3, 2, 3)
    assert latents.dtype == torch.float32
    assert not latents.requires_grad
    with torch.no_grad():
        mean, _ = vae._encode(video).chunk(2, dim=1)
        wanted = torch.stack(
            [(mean[:, i] - vae.config.latents_mean[i]) / vae.config.latents_std[i] for i in range(16)], 1
        )
        torch.testing.assert_close(latents, wanted)
        decoded = codec.decode(latents)
        torch.testing.assert_close(decoded, vae.decode(mean).sample, rtol=1e-4, atol=1e-5)
    assert decoded.shape == video.shape


def test_latents_look_back_alone_and_do_not_depend_on_earlier_calls(folders):
    codec = load_latent_codec(folders / "original")
    video = noise(1, 3, 9, 16, 16)
    latents = codec.encode(video)
    torch.testing.assert_close(codec.encode(video[:, :, :5]), latents[:, :, :2])
    assert torch.equal(codec.encode(video), latents)
    with pytest.raises(ValueError, match="8"):
        codec.encode(video[:, :, :8])


def test_names_of_the_original_vae_are_those_that_diffusers_knows():
    state = tiny_vae().state_dict()
    assert convert_wan_vae_to_diffusers(original_vae(state)).keys() == state.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_has_its_real_tokens_alone(folders, layout):
    encoder, model = load_text_encoder(folders / layout), tiny_umt5()
    found = encoder.encode(["a  red\nball", "a &amp;amp; ball", "", "ball " * 600])
    assert [tuple(text.shape) for text in found] == [(4, 16), (4, 16), (1, 16), (512, 16)]
    assert found[0].dtype == torch.bfloat16
    with torch.no_grad():
        # Padding to a fixed length behind a mask, as Wan does it.
        ids, mask = torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long)
        ids[0, :4], mask[0, :4] = torch.tensor([3, 4, 5, 1]), 1
        padded = model(input_ids=ids, attention_mask=mask).last_hidden_state[0, :4]
    torch.testing.assert_close(found[0], padded, rtol=0.02, atol=0.02)
    ids = torch.tensor([[3, 6, 5, 1]])
    with torch.no_grad():
        assert torch.equal(found[1], model(input_ids=ids).last_hidden_state[0])


def test_captions_are_cleaned_as_wan_does_it():
    assert clean(" a\tred \n ball &amp;quot;x&amp;quot; ") == 'a red ball "x"'


@pytest.mark.parametrize("layout", LAYOUTS)
def test_image_features_are_those_before_the_last_block(folders, layout):
    encoder, model = load_image_encoder(folders / layout), tiny_clip()
    frames = noise(2, 3, 20, 44)
    features = encoder.encode(frames)
    assert features.shape == (2, 5, 160)
    square = torch.nn.functional.interpolate(frames, (28, 28), mode="bicubic")
    pixels = ((square + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
    with torch.no_grad():
        wanted = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features, wanted[2])
    assert not torch.allclose(features, wanted[3])


def test_files_and_subfolders_may_be_named_themselves(folders):
    facts = load_latent_codec(folders / "original").fingerprint_facts
    for place in ("original/Wan2.1_VAE.pth", "diffusers/vae"):
        assert load_latent_codec(folders / place).fingerprint_facts == facts


def test_other_weights_have_another_fingerprint(folders, tmp_path):
    state = original_vae(tiny_vae().state_dict())
    state["conv1.bias"] = state["conv1.bias"].clone()
    state["conv1.bias"][3] += 1e-6
    torch.save(state, tmp_path / "Wan2.1_VAE.pth")
    found, wanted = (load_latent_codec(f).fingerprint_facts for f in (tmp_path, folders / "original"))
    assert found["weights"] != wanted["weights"]


@pytest.mark.parametrize(
    ("load", "file", "original", "model"),
    [
        (load_latent_codec, "Wan2.1_VAE.pth", original_vae, tiny_vae),
        (load_text_encoder, "models_t5_umt5-xxl-enc-bf16.pth", original_umt5, tiny_umt5),
        (
            load_image_encoder,
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
            original_clip,
            tiny_clip,
        ),
    ],
)
def test_incomplete_and_foreign_files_are_refused(folders, tmp_path, load, file, original, model):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no .*neither {file}"):
        load(tmp_path)
    (tmp_path / "google").symlink_to(folders / "original/google")
    for change in (lambda s: s.popitem(), lambda s: s.update({list(s)[-1]: torch.zeros(7)}), lambda s: s.clear()):
        state = original(model().state_dict())
        change(state)
        torch.save(state, tmp_path / file)
        with pytest.raises(CheckpointError, match="not what its name says"):
            load(tmp_path)


def test_a_damaged_diffusers_folder_is_refused(folders, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_bytes((folders / "diffusers/vae/config.json").read_bytes())
    weights = (folders / "diffusers/vae/diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_latent_codec(tmp_path)
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_latent_codec(tmp_path)


def test_a_tokeniser_is_needed(folders, tmp_path):
    (tmp_path / "text_encoder").symlink_to(folders / "diffusers/text_encoder")
    with pytest.raises(ValueError, match="has no tokeniser: google/umt5-xxl or tokenizer"):
        load_text_encoder(tmp_path)


def test_the_missing_extra_is_named(folders, monkeypatch):
    for name, load in (("diffusers", load_latent_codec), ("transformers", load_text_encoder)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ValueError, match=rf"encoding needs {name} .*pip install 'fw-train\[encode\]'"):
            load(folders / "original")
