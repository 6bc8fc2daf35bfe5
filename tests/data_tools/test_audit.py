import contextlib
import io
import json
import re
import shutil

import numpy as np
import pytest
from data_commands import command
from faulty_clips import (
    CRAFTED,
    FRAMES,
    INJECTED,
    RawClip,
    copy_clip,
    make_faulty,
    other_world,
    pack_raw,
    render,
)

from data_tools import audit
from data_tools.audit_checks import FAULTS, Finding
from data_tools.audit_clip import ClipAudit
from data_tools.paths import PATH_KINDS
from fw_train.data.quarantine import QUARANTINE, WRITTEN, QuarantineEntry, read_quarantine, write_quarantine
from fw_train.geometry import invert_rigid


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    return make_faulty(tmp_path_factory.mktemp("faulty"), [*INJECTED, *CRAFTED, "healthy", "twin"])


@pytest.fixture(scope="module")
def printed(faulty):
    """What the command says about it."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert command(audit, faulty, "--workers", 1, "--pictures", 0) == 1
    return text.getvalue().splitlines()


@pytest.fixture(scope="module")
def audited(faulty, printed):
    lines = [json.loads(line) for line in (faulty / audit.NUMBERS).read_text().splitlines()]
    return {line["key"]: line for line in lines}


@pytest.mark.parametrize("key", [*INJECTED, *CRAFTED])
def test_every_fault_is_named(audited, key):
    fault, *_, detail = INJECTED.get(key) or CRAFTED[key]
    found, *others = sorted(audited[key]["findings"], key=lambda found: found["fault"] != fault)
    assert found["fault"] == fault
    # What repeats while the camera moves is also in the wrong place.
    assert [other["fault"] for other in others] == ["geometry-disagrees"] * (key == "repeated")
    assert re.search(detail, found["detail"]), found["detail"]


def test_every_fault_that_is_known_is_injected():
    assert {fault for fault, *_ in (*INJECTED.values(), *CRAFTED.values())} | {"duplicate-clip"} == set(FAULTS)


def test_the_lines_on_the_screen_name_clip_fault_and_evidence(printed):
    (line,) = [line for line in printed if line.startswith("inverted:")]
    assert re.match(r"inverted: pose-inverted: the matrices are .* the error falls from \d\d.* %", line)
    faults = len(INJECTED) + len(CRAFTED) - 1
    assert f"{faults + 3} clips, {faults} with faults, 2 with warnings, {faults} in quarantine; see" in printed[-1]


def test_healthy_clips_of_a_faulty_dataset_have_no_findings(audited):
    assert audited["healthy"]["findings"] == []
    assert audited["healthy"]["error"] < 1e-3
    assert audited["healthy"]["min_coverage"] == 1


def test_a_copy_is_named_and_only_warned_of(audited, faulty):
    (found,) = audited["twin"]["findings"]
    assert found["fault"] == "duplicate-clip"
    assert "that of healthy" in found["detail"]
    assert {"twin", "silent", "healthy"}.isdisjoint(entry.key for entry in read_quarantine(faulty))


def test_the_list_holds_every_serious_fault(audited, faulty):
    assert {(entry.key, entry.fault) for entry in read_quarantine(faulty)} == {
        (key, found["fault"])
        for key, line in audited.items()
        for found in line["findings"]
        if FAULTS[found["fault"]].serious
    }


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A clip of each camera path, moving objects, affine depths, and one camera that stands still, poses inverted."""
    folder = tmp_path_factory.mktemp("clean")
    entries = []

    def add(key, kind, **changes):
        entry = render(folder / key, kind, moving=changes.pop("moving", 0.0))
        clip = copy_clip(folder / key, folder / "raw", key)
        entries.append({**entry, "id": key, **changes})
        return clip

    for kind in PATH_KINDS:
        add(kind, kind)
    add("moving", "handheld", moving=1.0)
    add("affine", "crane", depth_kind="affine_depth").labels("depth", lambda d: 0.2 * d + 3)
    add("disparity", "dolly", depth_kind="affine_disparity").labels("depth", lambda d: 5 / d + 0.3)
    still = add("tripod", "orbit")
    still.poses(lambda pose: other_world(pose[:1]).expand(FRAMES, 4, 4))
    for kind in ("depth", "points"):
        still.labels(kind, lambda labels: np.repeat(labels[:1], FRAMES, axis=0))
    still.frames([0] * FRAMES)
    out = folder / "inverted_pan"
    add("inverted_tripod", "orbit").poses(lambda pose: invert_rigid(other_world(pose[:1]).expand(FRAMES, 4, 4)))
    for kind in ("depth", "points"):
        RawClip(folder / "raw", "inverted_tripod").labels(kind, lambda labels: np.repeat(labels[:1], FRAMES, axis=0))
    RawClip(folder / "raw", "inverted_tripod").frames([0] * FRAMES)
    return pack_raw(folder / "raw", out.with_name("out"), entries)


def test_clean_data_has_no_faults(clean, capsys):
    assert command(audit, clean, "--workers", 1, "--min-coverage", 0.3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(":")[1].strip() for line in lines[:-1]} <= {"duplicate-clip"}
    assert "10 clips, 0 with faults" in lines[-1]
    assert not (clean / QUARANTINE).exists()


def forget_list(out):
    """As who wants to train on everything again."""
    for name in (QUARANTINE, WRITTEN):
        (out / name).unlink()


def test_lines_made_by_hand_survive_and_old_findings_go(clean, caplog):
    manual = QuarantineEntry("orbit", "manual", "a watermark")
    foreign = QuarantineEntry("gone", "manual", "of a clip that is no longer packed")
    other_tool = QuarantineEntry("pan", "blurred", "sharpness 0.1")
    write_quarantine(
        clean, [manual, foreign, other_tool, QuarantineEntry("pan", "pose-inverted", "of an earlier audit")]
    )
    assert command(audit, clean, "--workers", 1, "--pictures", 0) == 0
    assert set(read_quarantine(clean)) == {manual, foreign, other_tool}
    assert "names gone, which the dataset does not have" in caplog.text
    forget_list(clean)


def test_a_list_that_lost_what_people_wrote_is_an_error_before_the_work(clean, tmp_path):
    out = shutil.copytree(clean, tmp_path / "out")
    found, manual, foreign = (
        QuarantineEntry(*line)
        for line in (("pan", "pose-inverted", ""), ("orbit", "manual", "a watermark"), ("gone", "manual", ""))
    )
    write_quarantine(out, [found, manual, foreign])
    (out / QUARANTINE).unlink()
    with pytest.raises(ValueError, match=r"has lost 1 lines, the first for orbit \(manual\); copy them back from"):
        command(audit, out, "--workers", 1)
    with pytest.raises(ValueError, match="has lost 2 lines"):  # those of other clips would not be found again
        command(audit, out, "--workers", 1, "--clips", 2)
    assert len(read_quarantine(out, WRITTEN)) == 3
    (out / QUARANTINE).write_text('{"key": "orbit", "fault": "manual"}')
    assert command(audit, out, "--workers", 1, "--pictures", 0) == 0
    assert {entry.key for entry in read_quarantine(out, WRITTEN)} == {"orbit"}


def test_an_audit_of_some_clips_leaves_the_lines_of_others(clean):
    old = [QuarantineEntry(key, "pose-inverted", "of an earlier audit") for key in ("affine", "tripod")]
    write_quarantine(clean, old)
    assert command(audit, clean, "--workers", 1, "--pictures", 0, "--clips", 2) == 0  # rows 0 and 5: affine first
    assert len((clean / audit.NUMBERS).read_text().splitlines()) == 2
    assert read_quarantine(clean) == (old[1],)
    forget_list(clean)


def test_a_damaged_list_is_an_error_before_the_work(clean):
    (clean / QUARANTINE).write_text('{"key": "pan"\n')
    (clean / audit.REPORT).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"quarantine\.jsonl, line 1 is not JSON"):
        command(audit, clean, "--workers", 1)
    assert not (clean / audit.REPORT).exists()
    (clean / QUARANTINE).unlink()


def test_the_faults_that_quarantine_are_chosen(audited):
    clips = [
        ClipAudit(row, key, tuple(Finding(**found) for found in line["findings"]), None)
        for row, (key, line) in enumerate(audited.items())
    ]

    def quarantined(text):
        return {entry.key for entry in audit.merge([], clips, audit.fault_names(text))}

    assert quarantined("caption-missing,pose-inverted") == {"silent", "inverted", "inverted_elsewhere", "nerf"}
    assert quarantined("none") == set()
    assert quarantined("all") == {*audited} - {"healthy"}


def test_an_unknown_fault_is_wrong_usage(clean, capsys):
    with pytest.raises(SystemExit) as stop:
        command(audit, clean, "--quarantine", "inverted")
    assert stop.value.code == 2
    assert "inverted: the faults are unreadable, not-finite, pose-inverted" in capsys.readouterr().err


@pytest.mark.slow
def test_workers_change_nothing(clean):
    assert command(audit, clean, "--workers", 1, "--clips", 3, "--pictures", 2) == 0
    before = {name: (clean / name).read_bytes() for name in (audit.NUMBERS, audit.REPORT)}
    assert command(audit, clean, "--workers", 2, "--clips", 3, "--pictures", 2) == 0
    assert {name: (clean / name).read_bytes() for name in before} == before
