"""Training data, held-out clips and the weights that a run starts from must have been encoded alike."""

import shutil

import pytest
import torch
from sidecars import make_sidecar, noise_facts
from tiny_training import make_data, write_config

from fw_train.build import world_params
from fw_train.checkpoint.run_state import RunState
from fw_train.config import ConfigError, load_config
from fw_train.data.encodings import conflicts
from fw_train.data.manifest import Dataset
from fw_train.data.sidecar_files import fingerprint
from fw_train.encoders.latents import load_latent_codec
from fw_train.run.data import HeldOut, open_data
from fw_train.run.encodings import (
    BASE,
    INIT_FROM,
    VALIDATION,
    check_encodings,
    encodings_of,
    encodings_of_weights,
)
from fw_train.run.resume import check_data, data_facts
from fw_train.weights.files import CheckpointError
from fw_train.weights.stage import StageInfo, write_stage_weights

OTHER_TEXT = {"encoder": "other"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), clips=2)


@pytest.fixture
def copy(data, tmp_path):
    return shutil.copytree(data, tmp_path / "copy")


@pytest.fixture
def configure(data, tmp_path):
    def config(source=data, **sections):
        sections["train"] = {"stage": "stage2" if sections.get("weights", {}).get("init_from") else "stage1"}
        return load_config(write_config(tmp_path / "config.yaml", source, tmp_path / "out", **sections))

    return config


def ours(config, codec=None):
    wan = world_params(config).wan
    return encodings_of(open_data(config, wan), wan, codec)


def held_out(config):
    return {VALIDATION: HeldOut(config, world_params(config).wan, 0, 1).encodings}


def refusal(*arguments, allowed=()):
    with pytest.raises(ConfigError) as error:
        check_encodings(*arguments, allowed)
    return str(error.value)


def weights(path, encodings, stage="stage1"):
    names = {"stage0": "video.a", "stage1": "a"}
    info = StageInfo(stage, 3, "config", "base", torch.float32, encodings)
    write_stage_weights(path, {names[stage]: torch.zeros(2)}, info)
    return path


def test_what_is_encoded_alike_is_accepted(configure, copy, tmp_path):
    one = weights(tmp_path / "one.safetensors", ours(configure()))
    config = configure(data={"validation": str(copy)}, weights={"init_from": str(one)})
    found = encodings_of_weights(config)
    assert found == {INIT_FROM: ours(config)}
    check_encodings(config, ours(config), {**held_out(config), **found}, ())


def test_validation_encoded_with_another_text_encoder_is_refused(configure, copy):
    make_sidecar(Dataset(copy), "text", noise_facts("text", **OTHER_TEXT))
    config = configure(data={"validation": str(copy)})
    text = refusal(config, ours(config), held_out(config))
    there, here = (fingerprint(noise_facts("text", encoder=name))[:16] for name in ("other", "noise"))
    assert f"data.validation={copy} was not encoded like data.sources (`text` has the fingerprint {there} there" in text
    assert f"{here} here: encoder: 'other' there, 'noise' here)" in text
    assert f"`fw data encode {copy} --members text --replace`" in text
    assert "latent" not in text
    check_encodings(config, ours(config), held_out(config), {VALIDATION})


@pytest.mark.parametrize(("setting", "stage"), [(BASE, "stage0"), (INIT_FROM, "stage1")])
def test_weights_trained_with_another_vae_are_refused(configure, tmp_path, setting, stage):
    trained = ours(configure())
    trained["latent"] = {**trained["latent"], "encoder": "an older VAE"}
    path = weights(tmp_path / "step-3.safetensors", trained, stage)
    config = configure(weights={setting.partition(".")[2]: str(path)})
    others = encodings_of_weights(config)
    assert list(others) == [setting]
    text = refusal(config, ours(config), others)
    assert f"{setting}={path} was trained on data encoded otherwise (`latent` has the fingerprint" in text
    assert "encoder: 'an older VAE' there, 'noise' here" in text
    assert "`fw data encode DATA --members latent --replace`" in text
    check_encodings(config, ours(config), others, {setting})


def test_everything_that_differs_is_in_one_error(configure, copy, tmp_path):
    make_sidecar(Dataset(copy), "text", noise_facts("text", **OTHER_TEXT))
    one = weights(tmp_path / "one.safetensors", {"text": {"encoder": "a"}, "latent": {"encoder": "b"}})
    config = configure(data={"validation": str(copy)}, weights={"init_from": str(one)})
    text = refusal(config, ours(config), {**held_out(config), **encodings_of_weights(config)})
    assert text.count("has the fingerprint") == 3
    assert "--members text,latent --replace" in text


def test_sizes_and_lengths_of_clips_may_differ(configure, copy):
    facts = noise_facts("latent", size=[32, 48], frames=5)
    assert fingerprint(facts) != fingerprint(noise_facts("latent"))
    make_sidecar(Dataset(copy), "latent", facts)
    config = configure(data={"validation": str(copy)})
    check_encodings(config, ours(config), held_out(config), ())


def test_weights_that_say_nothing_pass(configure, tmp_path):
    older = weights(tmp_path / "older.safetensors", None)
    assert encodings_of_weights(configure(weights={"init_from": str(older), "base": str(older)})) == {}


def test_weights_whose_record_is_garbage_are_refused(configure, tmp_path):
    broken = weights(tmp_path / "broken.safetensors", ["text"])
    with pytest.raises(CheckpointError, match=r"make no sense: encodings='\[\"text\"\]'; fetch the file again"):
        encodings_of_weights(configure(weights={"init_from": str(broken)}))


def test_latents_encoded_online_count_as_those_of_the_same_codec(configure, tmp_path):
    online = {"latents": "online", "vae": "dct"}
    config = configure(data=online)
    found = ours(config, load_latent_codec("dct"))
    assert found.keys() == {"text", "latent"}
    assert found["latent"] == {"codec": "dct", "version": 1, "dtype": "float16", "resize": "cover-centre-area"}
    one = weights(tmp_path / "one.safetensors", {**found, "latent": {**found["latent"], "codec": "wan_vae"}})
    config = configure(data=online, weights={"init_from": str(one)})
    text = refusal(config, found, encodings_of_weights(config))
    assert "codec: 'wan_vae' there, 'dct' here" in text
    assert "give the VAE of those weights as data.vae" in text
    assert "fw data encode" not in text


def test_only_kinds_that_both_have_are_compared():
    assert conflicts({"text": {"encoder": "a"}}, {"clip": {"encoder": "b"}}) == {}


def test_a_resume_with_another_vae_is_refused(configure):
    config = configure(data={"latents": "online", "vae": "dct"})
    data = open_data(config, world_params(config).wan)
    saved = ours(config, load_latent_codec("dct"))

    def state(facts):
        return RunState(
            step=1, segments=((0, 4),), optimiser_steps=1, config={}, base_hash="", data_fingerprint=data.fingerprint,
            data_facts=facts,
        )  # fmt: skip

    exchanged = {**saved, "latent": {**saved["latent"], "version": 2}}
    check_data(state(data_facts(data, saved)), data, saved, ())
    with pytest.raises(
        ConfigError, match=r"not those that the run trained on \(`latent` has .*: version: 1 there, 2 here\)"
    ):
        check_data(state(data_facts(data, saved)), data, exchanged, ())
    check_data(state(data_facts(data, saved)), data, exchanged, {"data.sources"})
    check_data(state(data.facts), data, exchanged, ())  # saved before they were kept
