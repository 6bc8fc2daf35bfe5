import re
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import yaml

from fw_train.config import Config, ConfigError, SourceConfig, config_hash, from_tree, load_config, to_tree

CONFIGS = sorted(Path("configs").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_opens_with_its_facts(path):
    load_config(path)
    head = path.read_text().split("model:")[0]
    assert all(re.search(rf"^#\s+{fact}\s", head, re.MULTILINE) for fact in ("command", "hardware", "hours", "expect"))


def test_the_published_schedules_are_there_to_the_letter():
    stage1, stage2 = (load_config(f"configs/{name}.yaml") for name in ("stage1", "stage2"))
    for config, steps, batch in ((stage1, 20_000, 64), (stage2, 10_000, 112)):
        t = config.train
        assert (t.steps, t.global_batch, t.learning_rate, t.weight_decay) == (steps, batch, 1e-5, 1e-2)
        assert (config.run.save_every_steps, t.precision, t.gate_lr_scale) == (1000, "bf16", 1)
        assert config.data.frames == 81
        assert config.model.variant == "camera"
        assert config.loss.preset == "guide"
    assert stage1.data.sizes_px == ((336, 592),)
    assert set(stage2.data.sizes_px) == {(592, 336), (336, 592)}
    assert stage2.weights.init_from == "outputs/stage1/step-20000.safetensors"


def test_a_config_survives_the_way_through_yaml():
    config = load_config("configs/stage2.yaml")
    assert from_tree(yaml.safe_load(yaml.safe_dump(to_tree(config))), "again") == config


def test_configs_are_frozen():
    with pytest.raises(FrozenInstanceError):
        Config().train.steps = 3


def test_the_hash_sees_every_field():
    config = Config()
    assert config_hash(config) == config_hash(Config())
    assert config_hash(replace(config, train=replace(config.train, seed=1))) != config_hash(config)


def test_overrides_are_typed_and_applied_in_order():
    config = load_config(
        "configs/stage1.yaml",
        [
            "model.split_layer=16",
            "model.taps=[5, 8, 10, 13]",
            "train.learning_rate=1e-4",
            "data.frames=41",
            "data.frames=21",
        ],
    )
    assert config.model.split_layer == 16
    assert config.model.taps == (5, 8, 10, 13)
    assert config.train.learning_rate == 1e-4
    assert config.data.frames == 21


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  split_layr: 12\n", r"unknown key `model\.split_layr`; did you mean `model\.split_layer`\?"),
        ("modle:\n  dim: 12\n", r"unknown key `modle`; did you mean `model`\?"),
        ("train:\n  zzz: 1\n", r"unknown key `train\.zzz`; valid here: train\.stage, train\.steps"),
        ("train:\n  stage: stage3\n", r"`train\.stage` is one of stage0, stage1, stage2, got 'stage3'"),
        ("train:\n  steps: many\n", r"`train\.steps` is of type int, got 'many'"),
        ("train:\n  steps: 1.5\n", r"`train\.steps` is of type int, got '1\.5'"),
        ("train:\n  steps: true\n", r"`train\.steps` is of type int, got 'True'"),
        ("train:\n  learning_rate: fast\n", r"`train\.learning_rate` is of type float"),
        ("data:\n  sizes_px: [[336]]\n", r"`data\.sizes_px\[0\]` has 2 entries, got 1"),
        ("data:\n  sizes_px: 336\n", r"`data\.sizes_px` is a list"),
        ("model: 12\n", r"`model` is a section of keys, got '12'"),
        ("- model\n", r"expected sections"),
        ("train:\n  steps: 1\n  steps: 2\n", r"line 3: `steps` is given twice"),
        ("train: &a\n  steps: 1\nmodel: *a\n", r"aliases are not allowed"),
        ("train: [[[[[[[[[1]]]]]]]]]\n", r"nested deeper than 8"),
        ("train: !!python/object/apply:os.system ['touch canary']\n", r"not readable as plain YAML"),
        ("train: {\n", r"not readable as plain YAML"),
    ],
)
def test_what_cannot_be_read_is_one_clear_error(write, tmp_path, text, message):
    path = write(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.frames=80", r"data\.frames=80 is not 4k \+ 1, .*; use 81"),
        ("data.sizes_px=[[330, 592]]", r"330x592 is not divisible by 16; use 336x592"),
        ("data.sizes_px=[]", r"sizes_px is empty"),
        ("model.heads=7", r"model\.dim=1536 over 7 heads"),
        ("model.cross_heads=7", r"model\.cross_width=1152 over 7 heads"),
        ("model.split_layer=30", r"model\.split_layer=30 must lie in 1\.\.29"),
        (
            "model.split_layer=16",
            r"model\.taps=\[5, 8, 11, 17\] must be four ascending geometry blocks of which the last is 13",
        ),
        ("model.taps=[8, 5, 11, 17]", r"four ascending"),
        ("model.bridge_heads=4", r"heads of at most 256, .*; use 6, 8, 12, 16 or more"),
        ("model.head_chunk_frames=0", r"model\.head_chunk_frames must be at least 1"),
        ("model.register_tokens=-1", r"must not be negative"),
        ("train.micro_batch=3", r"global_batch=64 is not divisible by micro_batch=3; use one of \[1, 2, 4, 8"),
        ("train.warmup_steps=30000", r"warmup_steps=30000 must lie between 0 and train\.steps=20000"),
        ("train.learning_rate=-1", r"must be positive and finite"),
        ("train.learning_rate=nan", r"must be positive and finite"),
        ("train.camera_drop=1.5", r"is a probability"),
        ("flow.shift=0", r"flow\.shift=0\.0 must be positive"),
        ("loss.depth_weight=-1", r"loss\.depth_weight=-1\.0 must be finite and not negative"),
        ("train.stage=stage2", r"weights\.init_from is empty: stage 2 starts from"),
        ("weights.init_from=x.safetensors", r"init_from is for stage 2"),
        ("frames=41", r"not of the form section\.key=value"),
        ("data.frames", r"not of the form section\.key=value"),
        ("model.dimm=3", r"did you mean `model\.dim`"),
    ],
)
def test_what_does_not_fit_together_names_the_remedy(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("configs/stage1.yaml", [override])


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError, match=r"frames=80.*micro_batch=3"):
        load_config("configs/stage1.yaml", ["data.frames=80", "train.micro_batch=3"])


def test_a_missing_file_and_a_huge_one_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(tmp_path / "none.yaml")
    huge = tmp_path / "huge.yaml"
    huge.write_bytes(b"#" * (1 << 21))
    with pytest.raises(ConfigError, match="at most"):
        load_config(huge)


def test_datasets_are_read_from_file_and_command_line(write):
    path = write("data:\n  sources: [{path: data/indoor}, {path: data/b, weight: 3, name: outdoor}]\n")
    assert load_config(path).data.sources == (
        SourceConfig("data/indoor"),
        SourceConfig("data/b", weight=3.0, name="outdoor"),
    )
    assert load_config(path, ["data.sources=[{path: elsewhere}]"]).data.sources == (SourceConfig("elsewhere"),)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources=[{weight: 2}]", r"`data\.sources\[0\]\.path` is missing"),
        ("data.sources=[{path: a, weigth: 2}]", r"unknown key `data\.sources\[0\]\.weigth`; did you mean"),
        ("data.sources=[a]", r"`data\.sources\[0\]` is a section of keys, got 'a'"),
        ("data.sources=[{path: x/a}, {path: y/a}]", r"two datasets named a"),
        ("data.sources=[{path: a, weight: -1}]", r"weight -1.0 must be finite and not negative"),
        ("data.latents=online", r"data\.vae is empty"),
        ("data.vae=dct", r"data\.vae is for data\.latents=online"),
        ("data.flip=0.5", r"data\.flip changes pictures that were encoded already; use data\.latents=online"),
        ("data.max_temporal_stride=2", r"data\.max_temporal_stride changes pictures"),
        ("data.prefetch=0", r"data\.prefetch=0 must be at least 1"),
        ("data.max_substituted=2", r"data\.max_substituted=2.0 must lie between 0 and 1"),
        ("train.precision=fp16", r"fp16 runs under engine\.kind=fsdp2 alone"),
        ("engine.zero_stage=0", r"engine\.zero_stage=0 cannot accumulate bf16 gradients in fp32"),
        ("engine.zero_stage=4", r"`engine\.zero_stage` is one of 0, 1, 2, 3, got '4'"),
        ("engine.zero_stage=true", r"`engine\.zero_stage` is one of 0, 1, 2, 3, got 'True'"),
        ("run.keep_last=0", r"run\.keep_last=0 must be at least 1"),
        ("run.output=", r"run\.output is empty"),
        ("guard.hang_s=0", r"guard\.hang_s=0.0 must be positive"),
        ("train.max_grad_norm=0", r"train\.max_grad_norm=0.0 must be positive"),
    ],
)
def test_what_a_run_cannot_do_is_refused_with_a_remedy(write, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write("train: {stage: stage1}\n"), [override])
