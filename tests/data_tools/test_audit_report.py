import io
import re
from base64 import b64decode
from html.parser import HTMLParser

import av
import numpy as np
import pytest
from data_commands import command
from faulty_clips import make_faulty

from data_tools import audit
from data_tools.audit_pictures import ERRORS, error_colours, jpeg_bytes
from data_tools.audit_report import MAP, PADDING, report_html
from fw_train.pictures.camera_path import CameraPath

VOID = {"meta", "img", "br", "path", "polygon", "polyline", "circle"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps what the page says and refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.ids, self.said = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.sources += [found[name] for name in ("src", "href", "xlink:href") if name in found]
        self.ids += [found["id"]] if tag == "article" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    return make_faulty(tmp_path_factory.mktemp("reported"), ["cut", "healthy", "inverted", "silent", "twin"])


@pytest.fixture(scope="module")
def report(faulty):
    assert command(audit, faulty, "--workers", 1) == 1
    return (faulty / audit.REPORT).read_text(encoding="utf-8")


def test_the_report_needs_nothing_else(report):
    page = Page(report)
    assert len(page.sources) == 4 * (4 + 3 * 3)
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    without_pictures = re.sub(r"base64,[^\"]*", "", report)
    assert not re.search(r"https?:|//|@import|url\(|<script|<link", without_pictures)
    assert "prefers-color-scheme:dark" in report


def test_its_pictures_can_be_read(report):
    sources = Page(report).sources
    for source in sources[::7]:
        with av.open(io.BytesIO(b64decode(source.split(",")[1])), format="jpeg_pipe") as container:
            picture = next(container.decode(video=0))
        assert (picture.height, picture.width) == (48, 64)


def test_faulty_clips_come_first_with_evidence_and_remedy(report):
    page = Page(report)
    assert page.ids == ["cut", "inverted", "silent", "twin", "healthy"]
    card = report[report.index('<article id="inverted">') :].split("</article>")[0]
    assert "c2w and w2c swapped" in card
    assert "Invert the matrices" in card
    assert "falls from" in card
    assert card.count("<img") == 4 * 4  # video, depth, error, error without the mistake
    assert 'class="repaired"' in card
    healthy = report[report.index('<article id="healthy">') :].split("</article>")[0]
    assert healthy.count("<img") == 3 * 4
    assert 'class="repaired"' not in healthy


def test_a_cap_leaves_pictures_out_and_no_clip(faulty):
    assert command(audit, faulty, "--workers", 1, "--pictures", 1) == 1
    text = (faulty / audit.REPORT).read_text()
    assert Page(text).ids == ["cut", "inverted"]  # what cannot be read has no pictures
    assert "2 more clips with findings" in text
    assert all(f"<td>{key}</td>" in text for key in ("silent", "twin"))


def test_text_from_the_data_is_only_text(faulty):
    (clip,) = audit.audit(faulty, [2], audit.Limits(0.1, 0.05))
    pictures = audit.draw(faulty, [2], audit.Limits(0.1, 0.05))
    info = clip.facts.info.__class__(
        **{**vars(clip.facts.info), "caption": "<script>alert(1)</script>", "source": "<b>"}
    )
    text = report_html("<i>", [clip._replace(facts=clip.facts._replace(info=info))], pictures, [])
    assert "<script" not in text
    assert "<script>alert(1)</script>" in "".join(Page(text).said)
    assert "Audit of <i>" in "".join(Page(text).said)


def shown_path(faulty, centres):
    """The card of a healthy clip as if its cameras had been at `centres`, and the sides of the drawn path, of 240."""
    limits = audit.Limits(0.1, 0.05)
    path = CameraPath(np.array(centres), np.tile((0.0, 0, 1), (len(centres), 1)))
    pictures = {1: audit.draw(faulty, [1], limits)[1]._replace(path=path)}
    text = report_html("x", audit.audit(faulty, [1], limits), pictures, [])
    (line,) = re.findall(r'<polyline points="([^"]*)"', text)
    return text, np.ptp([[float(number) for number in place.split(",")] for place in line.split()], axis=0)


def test_a_camera_that_rises_is_not_drawn_as_one_that_goes_far(faulty):
    text, sides = shown_path(faulty, [(0, 0, 0), (0, -0.5, 0.02), (0, -1, 0.05)])
    np.testing.assert_allclose(sides, (0, 0.05 * (MAP - 2 * PADDING)), atol=0.2)
    assert "length 1 m, height 0 to 1 m" in text
    assert "1.28 m wide" in text


def test_a_camera_that_stands_still_is_drawn_as_standing(faulty):
    text, sides = shown_path(faulty, [(0, 0, 0), (1e-15, 1e-15, 0), (0, 0, -1e-15)])
    assert (sides < 0.1).all()
    assert "length 0 m, height 0 to 0 m" in text
    _, sides = shown_path(faulty, [(0, 0, 0), (1, 0.25, 0), (2, 0.5, 1)])
    np.testing.assert_allclose(sides, np.array((1, 0.5)) * (MAP - 2 * PADDING), atol=0.2)


def test_a_clean_dataset_is_said_to_be_clean(faulty):
    clips = audit.audit(faulty, [1], audit.Limits(0.1, 0.05))
    assert clips[0].key == "healthy"
    assert "Nothing was found" in report_html("x", clips, {}, [])


def test_error_colours_grow_brighter():
    colours = error_colours(np.geomspace(*ERRORS, 9)).astype(int).sum(axis=-1)
    assert (np.diff(colours) > 0).all()
    assert (error_colours(np.array([0.0, 1e-9, ERRORS[0]])) == error_colours(np.array(ERRORS[:1]))).all()


def test_a_jpeg_shows_the_picture():
    picture = np.zeros((30, 40, 3), np.uint8)
    picture[:, 20:] = (250, 130, 10)
    with av.open(io.BytesIO(jpeg_bytes(picture, (15, 20))), format="jpeg_pipe") as container:
        back = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    assert back.shape == (15, 20, 3)
    assert np.abs(back[:, :8]).max() < 12
    assert np.abs(back[:, 12:] - (250, 130, 10)).max() < 12
