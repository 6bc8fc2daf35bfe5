import base64
import json
import math
import re
import time

import numpy as np
import pytest
import torch
from chromium import BINARY, Page
from test_history import make_run

from fw_train.batch import Prediction
from fw_train.evaluation.scenes import shown_pixels
from fw_train.pictures.camera_path import CameraPath
from fw_train.pictures.scene import Scene
from fw_train.report.clips import Clip, clouds, unprojected
from fw_train.report.history import read_history
from fw_train.report.page import Report, Row, report_html, summary_rows, table_text


def make_scene(offset=0.0):
    """A slanted wall 4 to 6 away; points that are not finite or far off stand for what networks do."""
    rng = np.random.default_rng(0)
    depth = np.linspace(4, 6, 24 * 32).reshape(24, 32).astype(np.float32)
    x, y = np.meshgrid(np.linspace(-2, 2, 32), np.linspace(-1.5, 1.5, 24))
    points = np.stack((x, y, depth), -1).reshape(-1, 3)
    predicted = points + offset
    predicted[0], predicted[1] = np.nan, 1e6
    path = CameraPath(np.linspace((0, 0, 0), (1, 0, 0.5), 5), np.tile((0.0, 0.0, 1.0), (5, 1)))
    return Scene(
        frame=rng.integers(0, 255, (24, 32, 3), dtype=np.uint8),
        depth_true=depth,
        depth_predicted=depth + offset,
        valid=np.ones((24, 32), bool),
        points_true=points,
        points_predicted=predicted,
        point_colours=np.tile(np.array((250, 120, 10), np.uint8), (len(points), 1)),
        cameras_true=path,
        cameras_predicted=path,
    )


def make_report(folder, **changes):
    lines = [
        {"kind": "run", "step": 0, "code_version": "1 abc"},
        *({"kind": "step", "step": n, "loss/depth_loss": 1 / n, "throughput/samples_per_s": 3.0} for n in range(1, 9)),
        *({"kind": "validation", "step": n, "validation/depth_loss": 1.2 - 0.1 * n} for n in (0, 4, 8)),
    ]
    histories = [read_history(make_run(folder / "stage1", lines))]
    clips = [Clip(f"<clip{n}>", make_scene(2.0), make_scene(0.1), make_scene().points_true) for n in range(2)]
    return Report("A & B", histories, {"loss/depth": 0.8}, clips, "stage1", None)._replace(**changes)


def test_a_row_tells_before_after_and_how_much_better_than_the_constant(tmp_path):
    (row, *_) = summary_rows(make_report(tmp_path).histories, {"loss/depth": 0.8})
    assert row == Row("depth loss, stage1", 1.2, pytest.approx(0.4), 0.8)
    assert re.search(r"depth loss, stage1 +1\.2000 +0\.4000 +0\.8000 +2\.0x", table_text([row]))
    assert table_text([Row("x", None, 0.5, None)]).splitlines()[1].split() == ["x", "-", "0.5000", "-", "-"]


def test_the_cloud_has_screen_axes_and_leaves_far_points_away(tmp_path):
    placed, predicted, true = clouds(make_report(tmp_path).clips[0])
    assert len(true.places) == len(predicted.places) + 2 == len(predicted.colours) + 2
    assert np.array_equal(placed.places, true.places)
    assert true.places[0, 0] < 0 < true.places[0, 1]  # first pixel: left, above
    assert true.places[-1, 2] < true.places[0, 2]  # the last one is farther away
    assert np.abs(true.places).max() < 32767


def test_depth_and_cameras_put_pixels_where_the_points_are():
    fov = math.radians(50)
    focal = 12 / math.tan(fov / 2)
    scene = make_scene()
    pose9 = torch.zeros(1, 5, 9)
    pose9[..., 2], pose9[..., 6], pose9[..., 8] = 1, 0.5, fov  # ahead by half a unit
    prediction = Prediction(None, None, None, None, pose9)
    found = unprojected(prediction, scene)
    depth = scene.depth_true.ravel()
    u, v = np.meshgrid(np.arange(32) + 0.5, np.arange(24) + 0.5)
    np.testing.assert_allclose(found[:, 2], depth + 0.5, rtol=1e-6)
    np.testing.assert_allclose(found[:, 0], (u.ravel() - 16) / focal * depth, atol=1e-5)
    np.testing.assert_allclose(found[:, 1], (v.ravel() - 12) / focal * depth, atol=1e-5)


def test_a_large_frame_keeps_the_same_pixels_for_all_clouds():
    valid = np.ones((336, 592), bool)
    kept = shown_pixels(torch.from_numpy(valid))
    scene = make_scene()._replace(
        depth_predicted=np.full(valid.shape, 5.0, np.float32), valid=valid, points_true=np.zeros((len(kept), 3))
    )
    pose9 = torch.tensor([0, 0, 1.0, 0, 0, 0, 0, 0, 1]).expand(1, 5, 9)
    assert len(unprojected(Prediction(None, None, None, None, pose9), scene)) == len(kept) < valid.size


def test_text_from_outside_is_not_markup(tmp_path):
    page = report_html(make_report(tmp_path))
    assert "<clip0>" not in page
    assert "A &amp; B" in page
    assert "http" not in re.sub(r"data:[^\"]*", "", page).replace("http-equiv", "")


def test_a_report_needs_neither_clips_nor_figures(tmp_path):
    report = make_report(tmp_path, clips=[])
    empty = report.histories[0]._replace(trained={}, validated={}, status=None)
    assert "<h1>A &amp; B</h1>" in report_html(report._replace(histories=[empty], constant={}))


@pytest.mark.skipif(BINARY is None, reason="no chromium; apt install chromium")
def test_the_page_opens_offline_and_its_cloud_turns(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(report_html(make_report(tmp_path)))
    page = Page(tmp_path / "profile")
    try:
        page.open(path)
        x, y, width, height = json.loads(page.evaluate(
            "(() => { const c = document.querySelector('canvas'); c.scrollIntoView({block: 'center'});"
            "const r = c.getBoundingClientRect(); return JSON.stringify([r.x, r.y, r.width, r.height]); })()"
        ))  # fmt: skip
        pixels = (
            "(() => { const c = document.querySelector('canvas'), g = c.getContext('webgl');"
            "const d = new Uint8Array(4 * c.width * c.height);"
            "g.readPixels(0, 0, c.width, c.height, g.RGBA, g.UNSIGNED_BYTE, d); let n = 0, sum = 0;"
            "for (let i = 0; i < d.length; i += 4) if (d[i] > 200) { n += 1; sum += (i / 4) % c.width; }"
            "return [n, sum / n / c.width]; })()"
        )
        orange, middle = page.evaluate(pixels)
        assert orange > 500
        assert 0.3 < middle < 0.7
        before = page.evaluate("document.querySelector('.cloud').view.yaw")
        picture = page.evaluate("document.querySelector('canvas').toDataURL()")
        page.drag((x + width / 2, y + height / 2), (x + width / 2 + 150, y + height / 2))
        time.sleep(0.2)
        assert page.evaluate("document.querySelector('.cloud').view.yaw") == pytest.approx(before + 1.2, abs=0.05)
        assert page.evaluate("document.querySelector('canvas').toDataURL()") != picture
        page.evaluate("document.querySelectorAll('.cloud button')[1].click()")
        assert page.evaluate("document.querySelectorAll('.cloud button')[1].getAttribute('aria-pressed')") == "true"
        assert page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert base64.b64decode(page.screenshot()).startswith(b"\x89PNG")
        assert page.errors == []
        assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    finally:
        page.close()
