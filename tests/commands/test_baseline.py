import json

import pytest
from tiny_training import make_data, write_config

from fw_train.cli import main
from fw_train.commands.baseline import compare


def test_one_clip_is_its_own_best_constant(tmp_path, capsys):
    data = make_data(tmp_path, clips=1)
    config = write_config(tmp_path / "c.yaml", data, tmp_path / "out", data={"validation": str(data)})
    assert main(["baseline", str(config), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["term"] for row in rows] == ["depth", "point", "camera"]
    assert [row["constant"] for row in rows] == pytest.approx([0, 0, 0], abs=1e-5)


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
