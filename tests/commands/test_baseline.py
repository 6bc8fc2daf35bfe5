import json

import pytest
from tiny_training import make_data, write_config

from fw_train.cli import main
from fw_train.commands import baseline
from fw_train.commands.baseline import compare
from fw_train.config import load_config
from fw_train.evaluation.constant import constant_for, mean_labels


def test_one_clip_is_its_own_best_constant(tmp_path, capsys):
    data = make_data(tmp_path, clips=1)
    config = write_config(tmp_path / "c.yaml", data, tmp_path / "out", data={"validation": str(data)})
    assert main(["baseline", str(config), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["term"] for row in rows] == ["depth", "point", "camera"]
    assert [row["constant"] for row in rows] == pytest.approx([0, 0, 0], abs=1e-5)


def test_the_table_says_how_many_times_better_a_run_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(baseline, "constant_losses", lambda config, clips: {"depth": 3.0, "point": 1.0 * clips})
    lines = [{"kind": "validation", "step": step, "validation/depth_loss": 6.0 / (1 + step)} for step in (0, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = write_config(tmp_path / "c.yaml", "nowhere", tmp_path / "out")
    assert main(["baseline", str(config), "--clips", "7", "--run", str(tmp_path)]) == 0
    _, depth, point = capsys.readouterr().out.splitlines()
    assert depth.split() == ["depth", "3.0000", "6.0000", "1.5000", "2.00x"]
    assert point.split() == ["point", "7.0000", "-", "-"]


def test_the_constants_losses_are_the_guides_means_over_the_held_out_clips(tmp_path, monkeypatch):
    data = make_data(tmp_path, clips=3)
    sections = {"data": {"validation": str(data)}, "run": {"validation_samples": 3}}
    config = load_config(write_config(tmp_path / "c.yaml", data, tmp_path / "out", **sections))
    averaged, judged = [], []

    def means(config, clips, **rest):
        averaged.append(clips)
        return mean_labels(config, clips, **rest)

    def ever_worse(means, batch):
        """The clips are alike, so each would be hit: cameras that are 0.1, 0.2, 0.3 beside it."""
        judged.append(batch.keys)
        right = constant_for(means, batch)
        return right._replace(cameras=right.cameras + 0.1 * len(judged))

    monkeypatch.setattr(baseline, "mean_labels", means)
    monkeypatch.setattr(baseline, "constant_for", ever_worse)
    losses = baseline.constant_losses(config, clips=2)
    assert losses == pytest.approx({"depth": 0, "point": 0, "camera": (0.01 + 0.04 + 0.09) / 3}, abs=1e-5)
    assert averaged == [2]
    assert len(set(judged)) == 3


def test_a_run_stands_beside_it_and_validation_is_needed(tmp_path, capsys):
    lines = [
        {"kind": "validation", "step": step, "validation/depth_loss": depth, "validation/camera_loss": 0.5}
        for step, depth in ((0, 4.0), (20, 1.0), (10, 2.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = {row.term: row for row in compare({"depth": 3.0, "point": 1.0}, tmp_path)}
    assert rows["depth"] == ("depth", 3.0, 4.0, 1.0)
    assert rows["point"] == ("point", 1.0, None, None)
    config = write_config(tmp_path / "c.yaml", "nowhere", tmp_path / "out")
    assert main(["baseline", str(config)]) == 1
    assert "data.validation is empty" in capsys.readouterr().err
