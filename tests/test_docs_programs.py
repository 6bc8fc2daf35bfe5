"""What the documentation tells people to run is run: its programs, and every command of the tutorial, on small data."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from documents import PAGES, blocks, commands
from raw_clips import FOCAL, clip_labels, write_video
from tiny_training import MODEL, make_data
from trained_stages import random_base, tiny_wan_of, trained

from fw_train.cli import main

ROOT = Path.cwd()
TUTORIAL_MODEL = {**MODEL, "text_dim": 16}  # as wide as the small text encoder
PROGRAMS = [block for page in PAGES for block in blocks(page) if block.marker == "run"]

# Sizes, lengths and steps that a test has the time for; everything else is run as it is shown.
SMALL = {
    "336x592": "32x48",
    "--frames 81": "--frames 5",
    "20000": "4",
    "10000": "2",
    "--gpus 8": "--gpus 1",
    "--scenes 8": "--scenes 2",
}
# A judgement of the run or of this machine, not of the command.
MAY_SAY_NO = ("promote", "doctor")
# Ends its process; looks at the process it is in.
OF_THEIR_OWN = ("train", "doctor")


def python(*words, folder):
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FW_TRACEBACK": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the names of the examples: packed data, and a trained stage 1."""
    folder = tmp_path_factory.mktemp("examples")
    packed = make_data(folder, clips=4)
    (folder / "data").mkdir()
    for name in ("train", "held_out"):
        (folder / "data" / name).symlink_to(packed, target_is_directory=True)
    checkpoint = trained(folder / "outputs" / "stage1", "stage1")
    checkpoint.rename(checkpoint.with_name("step-20000.safetensors"))
    path = checkpoint.with_name("config.yaml")
    tree = yaml.safe_load(path.read_text())
    tree["data"]["sources"] = [{"path": "data/train"}]
    path.write_text(yaml.safe_dump(tree))
    return folder


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda block: block.text.strip().splitlines()[-1][:60])
def test_programs_run(program, workplace):
    done = python("-c", program.text, folder=workplace)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout or "print" not in program.text


def small(words):
    """The words of a command, with small sizes."""
    text = "\0".join(words)
    for large, little in SMALL.items():
        text = text.replace(large.replace(" ", "\0"), little.replace(" ", "\0"))
    return text.split("\0")


def merged(tree, changes):
    return {
        key: merged(tree.get(key, {}), value) if isinstance(value, dict) else value for key, value in changes.items()
    } | {key: value for key, value in tree.items() if key not in changes}


def write_videos_and_predictions(folder, names):
    """`videos/` and, as VGGT leaves them, `predictions/` and `predictions_held_out/`."""
    frames, height, width = 5, 32, 48
    (folder / "videos").mkdir()
    for number, name in enumerate(names):
        depth, _, cameras = clip_labels(frames, height, width, step=0.05 + 0.01 * number, slope=0.2 + 0.02 * number)
        write_video(folder / "videos" / f"{name}.mp4", frames, height, width)
        focal = FOCAL * width
        intrinsic = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        place = folder / ("predictions_held_out" if number == 0 else "predictions")
        place.mkdir(exist_ok=True)
        np.savez(
            place / f"{name}.npz",
            depth=depth[..., None],
            extrinsic=cameras.cam_from_world[:, :3].numpy(),
            intrinsic=np.repeat(intrinsic[None], frames, axis=0),
        )


def write_tutorial_config(folder, block):
    """The file that the page shows, with the sizes of a test."""
    tiny = {
        "model": TUTORIAL_MODEL,
        "data": {"frames": 5, "sizes_px": [[32, 48]], "text_tokens": 8, "workers": 0},
        "train": {"steps": 4, "global_batch": 4, "precision": "fp32", "activation_checkpointing": "none"},
        "loss": {"chamfer_points": 64},
        "run": {"validation_samples": 1, "validate_every_steps": 0, "log_every_steps": 1},
    }
    tree = merged(yaml.safe_load(block.text), tiny)
    path = folder / block.marker.removeprefix("file: ")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))


def run_all(page, folder, capfd):
    """Runs the page's commands in their order, in a folder where they find what they name."""
    for command in commands(page):
        words = small(command.words)
        if words[0] in OF_THEIR_OWN:
            done = python("-m", "fw_train.cli", *words, folder=folder)
            code, told = done.returncode, done.stdout + done.stderr
        else:
            code = main(words)
            told = "".join(capfd.readouterr())
        assert code == 0 or (code == 1 and words[0] in MAY_SAY_NO), f"fw {' '.join(words)}: {told[-3000:]}"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
def test_every_command_of_the_tutorial_runs_in_its_order(here, capfd):
    from wan_encoders import save_original

    page = ROOT / "docs/tutorial.md"
    (config,) = [block for block in blocks(page) if block.language == "yaml"]
    assert len(list(commands(page))) > 20
    write_videos_and_predictions(here, ["a", "b", "c", "d", "e"])
    write_tutorial_config(here, config)
    wan = here / "models" / "Wan2.1-T2V-1.3B"
    wan.mkdir(parents=True)
    save_original(wan)
    random_base(wan / "diffusion_pytorch_model.safetensors", tiny_wan_of(here, **TUTORIAL_MODEL))
    run_all(page, here, capfd)
    assert (here / "outputs/eval/eval.json").exists()
    assert (here / "exports/diffusers/config.json").exists()


def write_demo_outputs(folder):
    """What README's commands find of a finished demo: held-out clips and weights of stages 1 and 2, small ones."""
    demo = folder / "outputs" / "demo"
    held_out = demo / "data" / "held_out"
    for words in (
        f"data synth {demo}/raw --scenes 2 --frames 5 --size 32x48",
        f"data pack {demo}/raw {held_out}",
        f"data encode {held_out} --codec dct --text hash:8",
    ):
        assert main(words.split()) == 0
    for stage, step, weights in (
        ("stage1", 350, {}),
        ("stage2", 200, {"init_from": demo / "stage1/step-350.safetensors"}),
    ):
        checkpoint = trained(demo / stage, stage, **weights)
        checkpoint.rename(checkpoint.with_name(f"step-{step}.safetensors"))
        path = checkpoint.with_name("config.yaml")
        tree = yaml.safe_load(path.read_text())
        tree["data"] |= {"sources": [{"path": str(held_out)}], "validation": str(held_out), "text_tokens": 64}
        path.write_text(yaml.safe_dump(tree))


@pytest.mark.slow
def test_every_command_of_the_readme_runs_in_its_order(here, capfd):
    for name in ("configs", "tests", "docs", "launch"):
        (here / name).symlink_to(ROOT / name, target_is_directory=True)
    write_demo_outputs(here)
    run_all(ROOT / "README.md", here, capfd)
    assert (here / "clip" / "video.mp4").exists()
    assert (here / "report.html").exists()
