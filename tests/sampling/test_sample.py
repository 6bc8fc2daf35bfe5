"""`fw sample` from end to end: small networks of every kind with random weights, real encoders, and every wrong input."""

import hashlib
import json
import shutil

import pytest
import torch
from packed_clips import make_packed
from safetensors.torch import load_file, save_file
from tiny_training import write_config as write_tiny
from wan_encoders import save_diffusers

from fw_train.build import base_identity, build_model, trainable_shapes, world_params
from fw_train.camera_files import read_cameras
from fw_train.cli import main
from fw_train.config import config_hash, load_config
from fw_train.encoders.text import load_text_encoder
from fw_train.inference import write_config
from fw_train.pictures.drawing import png_bytes
from fw_train.sampling.trajectories import generated_trajectory, square_pixels
from fw_train.weights.stage import StageInfo, write_stage_weights

FILES = ["cameras.txt", "colmap", "contact_sheet.png", "depth", "depth.mp4", "points.ply", "sample.json", "video.mp4"]
SIZE = (32, 48)
FAST = ("--steps", "2", "--frames", "5", "--size", "32x48")


def trained(folder, stage, data, /, model=None, **weights):
    """step-3.safetensors of a run of `stage` with random weights, and its configuration."""
    folder.mkdir()
    sections = {"weights": weights, "train": {"stage": stage}, "data": {"text_tokens": 12}, "model": model or {}}
    config = load_config(write_tiny(folder / "given.yaml", data, folder, **sections))
    network = build_model(world_params(config), torch.float32, seed=5)
    generator, own = torch.Generator().manual_seed(1), dict(network.named_parameters())
    tensors = {
        name: own[name].detach() + 0.1 * torch.randn(own[name].shape, generator=generator)
        for name in trainable_shapes(network, stage)
    }
    path = folder / "step-3.safetensors"
    write_stage_weights(path, tensors, StageInfo(stage, 3, config_hash(config), base_identity(config), torch.float32))
    write_config(folder, config)
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs over a packed dataset that was encoded without weights."""
    folder = tmp_path_factory.mktemp("runs")
    data = make_packed(folder, clips=((2, *SIZE, 5),), kinds=())
    assert main(["data", "encode", str(data), "--codec", "dct", "--text", "hash:8", "--workers", "1"]) == 0
    stage0 = trained(folder / "stage0", "stage0", data)
    stage1 = trained(folder / "stage1", "stage1", data, base=stage0)
    trained(folder / "stage2", "stage2", data, base=stage0, init_from=stage1)
    return folder


def sample(place, *words, stage="stage2", fast=FAST):
    return main(["sample", str(place / stage / "step-3.safetensors"), *map(str, words), *fast])


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(capfd, place, *words, **options):
    """The one line that a refusal writes."""
    out = place / "refused"
    assert sample(place, "--output", out, *words, **options) == 1
    assert not out.exists()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fw sample: ")]
    return line


def test_a_prompt_and_an_orbit_give_every_file(place, tmp_path):
    assert sample(place, "--output", tmp_path / "out", "--prompt", "a tilted wall", "--orbit", 20) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert len(list((tmp_path / "out/depth").iterdir())) == 5
    record = json.loads((tmp_path / "out/sample.json").read_text())
    assert record["prompt"] == "a tilted wall"
    assert record["camera"]["from"] == "orbit"
    assert record["camera"]["predicted_off"]["deg"] > 0
    assert (record["guidance"], record["shift"], record["stage"], record["step"]) == (5, 5, "stage2", 3)
    assert len(read_cameras(tmp_path / "out/cameras.txt", 5).cam_from_world) == 5


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(place, tmp_path):
    words = ("--prompt", "a wall", "--pan", -20, "--sampler", "heun")
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        assert sample(place, "--output", tmp_path / name, *words, "--seed", seed) == 0
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert all(a[name] != c[name] for name in a)


def test_no_text_and_no_camera_are_fine_and_a_cached_text_is_the_prompt(place, tmp_path):
    (embedding,) = load_text_encoder("hash:8").encode(["a wall"])
    save_file({"text": embedding.bfloat16()}, tmp_path / "cached.safetensors")
    save_file({"text": embedding.bfloat16()[:1]}, tmp_path / "other.safetensors")
    plain = ("--points", 50, "--guidance", 1)
    assert sample(place, "--output", tmp_path / "none", *plain) == 0
    assert sample(place, "--output", tmp_path / "same", "--text", tmp_path / "cached.safetensors", *plain) == 0
    assert sample(place, "--output", tmp_path / "else", "--text", tmp_path / "other.safetensors", *plain) == 0
    none, same, other = (contents(tmp_path / name)["points.ply"] for name in ("none", "same", "else"))
    assert len({none, same, other}) == 3
    assert json.loads((tmp_path / "none/sample.json").read_text())["points"]["count"] == 50


def test_a_stage_2_video_follows_the_camera_and_the_geometry_is_shown_it_only_when_asked(place, tmp_path):
    words = {
        "still": (),
        "left": ("--pan", -30),
        "right": ("--pan", 30),
        "shown": ("--pan", 30, "--show-camera"),
        "guided": ("--pan", 30, "--camera-guidance", 3),
    }
    for name, more in words.items():
        assert sample(place, "--output", tmp_path / name, *more) == 0
    found = {name: contents(tmp_path / name) for name in words}
    assert len({files["video.mp4"] for files in found.values()}) == 4
    assert found["shown"]["video.mp4"] == found["right"]["video.mp4"]
    assert found["shown"]["points.ply"] != found["right"]["points.ply"]


def test_a_camera_file_steers_as_the_motion_it_holds(place, tmp_path):
    assert sample(place, "--output", tmp_path / "pan", "--pan", 30) == 0
    fractions = square_pixels(torch.tensor(torch.pi / 4, dtype=torch.float64), SIZE)
    path = generated_trajectory("pan", torch.pi / 6, 5, 1.0, fractions)
    rows = [
        " ".join(map(repr, [0.0, *fractions.tolist(), 0.0, 0.0, *pose[:3].flatten().tolist()]))
        for pose in path.cameras().cam_from_world
    ]
    (tmp_path / "path.txt").write_text("\n".join(rows))
    assert sample(place, "--output", tmp_path / "file", "--camera", tmp_path / "path.txt") == 0
    a, b = contents(tmp_path / "pan"), contents(tmp_path / "file")
    assert a["video.mp4"] == b["video.mp4"]


def test_stage_1_samples_its_base_and_cannot_be_steered(place, tmp_path, capfd):
    assert sample(place, "--output", tmp_path / "out", "--prompt", "a wall", stage="stage1") == 0
    assert "does not see the camera" in refused(capfd, place, "--pan", 20, stage="stage1")


def test_a_stage_0_checkpoint_has_no_geometry(place, capfd):
    assert "stage 0, the video branch alone, which has no geometry" in refused(capfd, place, stage="stage0")


def test_each_wrong_input_is_one_clear_error(place, tmp_path, capfd):
    pose = "0 1 1 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n"
    (tmp_path / "short.txt").write_text(pose * 4)
    (tmp_path / "wide.png").write_bytes(png_bytes(torch.zeros(32, 64, 3, dtype=torch.uint8).numpy()))
    save_file({"text": torch.zeros(3, 9, dtype=torch.bfloat16)}, tmp_path / "wide.safetensors")
    save_file({"text": torch.zeros(13, 8, dtype=torch.bfloat16)}, tmp_path / "long.safetensors")
    for words, message in (
        (("--camera", tmp_path / "short.txt"), "4 rows for 5 frames"),
        (("--camera", tmp_path / "none.txt"), "no camera file"),
        (("--image", tmp_path / "wide.png"), "variant 't2v' takes no first frame; leave --image out"),
        (("--text", tmp_path / "none.safetensors"), "no cached embedding"),
        (("--text", tmp_path / "wide.safetensors"), "has 9 features, the network takes 8"),
        (("--text", tmp_path / "long.safetensors"), "13 tokens, data.text_tokens is 12"),
        (("--prompt", "x", "--text-encoder", "hash:16"), "has 16 features, the network takes 8"),
        (("--camera-guidance", 2), "--camera-guidance needs a camera"),
        (("--steps", 0, "--fov", 200), "--steps must be at least 1; --fov must lie between"),
        (("--config", tmp_path / "none.yaml"), "none.yaml"),
    ):
        fast = FAST[2:] if "--steps" in words else FAST
        assert message in refused(capfd, place, *words, fast=fast), words
    assert "6 frames are not 4k + 1" in refused(capfd, place, fast=("--frames", "6"))
    assert "30x48 cannot be cut into tokens of 16x16 pixels; use 32x48" in refused(
        capfd, place, fast=("--size", "30x48")
    )


def test_an_output_that_is_something_else_is_left_alone(place, tmp_path, capfd):
    (tmp_path / "notes.txt").write_text("mine")
    assert sample(place, "--output", tmp_path) == 1
    assert "holds no earlier sample" in capfd.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_weights_without_their_data_need_to_be_told_the_encoders(place, tmp_path, capfd):
    away = "data.sources=[{path: gone}]"
    assert "could be encoded in several ways: give" in refused(capfd, place, "--prompt", "x", away)
    encoders = ("--codec", "dct", "--text-encoder", "hash:8")
    assert sample(place, "--output", tmp_path / "told", "--prompt", "x", away, *encoders) == 0
    assert sample(place, "--output", tmp_path / "known", "--prompt", "x") == 0
    told, known = contents(tmp_path / "told"), contents(tmp_path / "known")
    assert told["video.mp4"] == known["video.mp4"]


def test_another_text_encoder_than_the_runs_is_refused(place, tmp_path, capfd):
    """The dataset says umt5, and there is no Wan folder."""
    save_diffusers(tmp_path / "wan")
    data = make_packed(tmp_path, clips=((1, *SIZE, 5),), kinds=())
    assert main(["data", "encode", str(data), "--model", str(tmp_path / "wan"), "--workers", "1"]) == 0
    line = refused(capfd, place, "--prompt", "x", "--data", data)
    assert (
        "prompts were encoded by umt5 in this run: give the Wan folder that holds the encoder with --model DIR" in line
    )


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A control-camera network with first frames, all of its encoders in a Wan folder."""
    folder = tmp_path_factory.mktemp("wan")
    save_diffusers(folder / "model")
    data = make_packed(folder, clips=((1, *SIZE, 5),), kinds=())
    model = ["--model", str(folder / "model"), "--members", "latent,text", "--workers", "1"]
    assert main(["data", "encode", str(data), *model]) == 0
    sizes = {"variant": "camera", "reference_conv": True, "text_dim": 16, "clip_dim": 160}
    trained(folder / "stage1", "stage1", data, sizes)
    picture = torch.randint(256, (*SIZE, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    (folder / "first.png").write_bytes(png_bytes(picture))
    (folder / "dark.png").write_bytes(png_bytes(picture // 4))
    (folder / "wide.png").write_bytes(png_bytes(picture[:, :32]))
    return folder


def test_a_control_camera_network_takes_first_frame_and_rays_in_stage_1(wan, tmp_path):
    model = ("--model", wan / "model", "--prompt", "a red ball")
    for name, words in {
        "still": ("--image", wan / "first.png"),
        "pan": ("--image", wan / "first.png", "--pan", 20),
        "dark": ("--image", wan / "dark.png"),
    }.items():
        assert sample(wan, "--output", tmp_path / name, *model, *words, stage="stage1") == 0
    assert len({contents(tmp_path / name)["video.mp4"] for name in ("still", "pan", "dark")}) == 3


def test_images_of_another_size_and_none_are_refused(wan, capfd):
    model = ("--model", wan / "model")
    line = refused(capfd, wan, *model, "--image", wan / "wide.png", stage="stage1")
    assert "wide.png is 32x32 (height x width), the clip 32x48; scale the image, or give --size 32x32" in line
    assert "starts from a first frame; give it with --image" in refused(capfd, wan, *model, stage="stage1")
    assert "cannot be read as an image" in refused(
        capfd, wan, *model, "--image", wan / "model/vae/config.json", stage="stage1"
    )


def test_the_wan_folder_must_be_the_one_of_the_data(wan, tmp_path, capfd):
    shutil.copytree(wan / "model", tmp_path / "model")
    path = tmp_path / "model/vae/diffusion_pytorch_model.safetensors"
    vae = {name: tensor + 0.01 for name, tensor in load_file(path).items()}
    save_file(vae, path, {"format": "pt"})
    image = ("--image", wan / "first.png")
    line = refused(capfd, wan, "--model", tmp_path / "model", *image, stage="stage1")
    assert "the encoder for `latent` is not the one of the run's data (weights: " in line
