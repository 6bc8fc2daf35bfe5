import pytest

from fw_train.cli import main


def run(capsys, *arguments):
    assert main(["params", *arguments]) == 0
    return capsys.readouterr().out


def rows(text):
    """First word -> the integers of the line."""
    table = {}
    for line in text.splitlines():
        words = line.split()
        numbers = [int(word.replace(",", "")) for word in words if word.replace(",", "").isdigit()]
        if words and numbers:
            table.setdefault(words[0], numbers)
    return table


def test_the_real_model_has_the_known_sizes(capsys):
    table = rows(run(capsys, "configs/stage1.yaml"))
    millions = {name: round(numbers[0] / 1e6) for name, numbers in table.items()}
    assert millions["video"] == 1616
    assert millions["latent_bridge"] == 57
    assert millions["geo_blocks"] == pytest.approx(963 + 170, abs=1)
    assert millions["heads"] == 50
    assert millions["camera_adapters"] == 28
    assert millions["irg_cross_attns"] == 191
    assert table["total"][1] / 1e9 == pytest.approx(1.24, abs=0.01)


def test_stage_2_trains_more_and_the_video_branch_never(capsys):
    table = rows(run(capsys, "configs/stage2.yaml"))
    assert table["video"][1] == 0
    assert table["total"][1] / 1e9 == pytest.approx(1.46, abs=0.01)


def test_text_to_video_blocks_have_the_known_size(capsys):
    table = rows(run(capsys, "configs/stage1.yaml", "model.variant=t2v"))
    assert round(table["video"][0] / 1e6) == 1419
    assert table["geo_blocks"][0] / 1e6 == pytest.approx(878 + 170, abs=1)


def test_published_figures_are_shown_with_the_reason_where_they_differ(capsys):
    text = run(capsys, "configs/stage1.yaml")
    assert "5 M  (two layers of width 1536 with a 4x feed-forward, as published, have 57 M)" in text
    assert "published" not in run(capsys, "configs/demo.yaml")


def test_every_rule_of_the_stage_is_counted(capsys):
    assert "gamma_m[12]" in run(capsys, "configs/stage2_14b.yaml")


def test_the_demo_network_has_one_to_three_million_parameters(capsys):
    assert 1e6 < rows(run(capsys, "configs/demo.yaml"))["total"][0] < 3e6


def test_exit_codes(capsys):
    assert main(["params", "configs/none.yaml"]) == 1
    assert main(["params", "configs/stage1.yaml", "model.dmi=3"]) == 1
    assert "did you mean `model.dim`" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        main(["params"])
    assert usage.value.code == 2
    with pytest.raises(SystemExit) as unknown:
        main(["prams", "configs/stage1.yaml"])
    assert unknown.value.code == 2
    with pytest.raises(SystemExit) as stray:
        main(["params", "configs/stage1.yaml", "--fast"])
    assert stray.value.code == 2
