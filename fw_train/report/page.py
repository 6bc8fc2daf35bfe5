"""The report as one HTML file that needs nothing else: no network, light and dark."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fw_train.pictures.colours import DepthScale, depth_picture, depth_scale
from fw_train.pictures.drawing import Picture, png_bytes
from fw_train.pictures.scene import Scene, camera_sheet
from fw_train.report.charts import Series, line_chart
from fw_train.report.clips import Clip, Cloud, clouds
from fw_train.report.history import Curve, History

TERMS = {"depth": "depth loss", "point": "points loss", "camera": "cameras loss"}
STAGES = {
    "stage0": "the video branch learns to generate",
    "stage1": "the geometry branch learns on frozen features",
    "stage2": "both branches exchange what they know",
}
SAMPLE_VIDEOS = {"video.mp4": "video", "depth.mp4": "its depth"}


class Row(NamedTuple):
    """A metric of the summary; None: not measured."""

    name: str
    before: float | None
    after: float | None
    constant: float | None


class Report(NamedTuple):
    title: str
    histories: Sequence[History]
    constant: Mapping[str, float]  # the best constant prediction, by the names of `fw eval`
    clips: Sequence[Clip]
    clips_run: str  # whose network the clips show
    sample: Path | None  # a folder of `fw sample`


def report_html(report: Report) -> str:
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="faint">{escape(_ended(report.histories))}</p>',
        _summary(summary_rows(report.histories, report.constant)),
        *_clips(report),
        _cloud(report.clips[0]) if report.clips else "",
        _sample(report.sample) if report.sample else "",
        "".join(_curves(history, report.constant) for history in report.histories),
        "<h2>Configuration</h2>",
        "".join(_configuration(history) for history in report.histories),
    ]
    own = files("fw_train.report")
    style, script = ((own / name).read_text(encoding="utf-8") for name in ("page.css", "viewer.js"))
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(report.title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{style}</style></head><body><main>{''.join(parts)}</main><script>{script}</script></body></html>\n"
    )


def summary_rows(histories: Sequence[History], constant: Mapping[str, float]) -> list[Row]:
    """Losses on the held-out clips: geometry of the last run that trains it first, then the diffusion of every run."""
    rows = []
    for history in histories:
        if history.stage == "stage1":
            for term, name in TERMS.items():
                before, after = _ends(history.validated.get(f"validation/{term}_loss"))
                rows.append(Row(f"{name}, {history.folder.name}", before, after, constant.get(f"loss/{term}")))
        else:
            before, after = _ends(history.validated.get("validation/diffusion"))
            rows.append(Row(f"diffusion loss, {history.folder.name}", before, after, None))
    return rows


def table_text(rows: Sequence[Row]) -> str:
    """The summary for a terminal."""
    lines: list[tuple[str, ...]] = [("metric on held-out clips", "before", "after", "constant", "better than constant")]
    for row in rows:
        lines.append((row.name, *(_figure(value) for value in row[1:]), _times(row)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def _ends(curve: Curve | None) -> tuple[float | None, float | None]:
    return (curve.values[0], curve.values[-1]) if curve else (None, None)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _times(row: Row) -> str:
    return f"{row.constant / row.after:.1f}x" if row.constant and row.after else "-"


def _ended(histories: Sequence[History]) -> str:
    states = [f"{h.folder.name} {h.status.state} at step {h.status.step}" for h in histories if h.status]
    code = {history.code for history in histories if history.code}
    return ", ".join([*states, *(f"code {version}" for version in sorted(code))])


def _summary(rows: Sequence[Row]) -> str:
    lines = "".join(
        f"<tr><td>{escape(row.name)}</td>{''.join(f'<td>{_figure(value)}</td>' for value in row[1:])}"
        f'<td class="better">{_times(row)}</td></tr>'
        for row in rows
    )
    return (
        "<h2>What was learnt</h2><p>Losses on held-out clips, smaller is better. Geometry is judged at noise level 0.1 with the "
        "camera hidden from the network; <i>constant</i> is the best prediction that is the same for every clip.</p>"
        '<div class="wide"><table><thead><tr><th>loss</th><th>before</th><th>after</th><th>constant</th>'
        f"<th>better than constant</th></tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _clips(report: Report) -> Iterator[str]:
    if not report.clips:
        return
    yield (
        f"<h2>Depth</h2><p>The middle frame of held-out clips, bright where near: what the network of {escape(report.clips_run)} "
        "predicted before its first and after its last step, and the truth. One scale of colours for each clip.</p>"
    )
    for clip in report.clips:
        scale = depth_scale(clip.after.depth_true.astype(np.float32), clip.after.valid)

        pictures = {
            "frame": clip.after.frame,
            "before": _predicted(clip.before, scale),
            "after": _predicted(clip.after, scale),
            "truth": depth_picture(clip.after.depth_true, clip.after.valid, scale),
        }
        figures = "".join(
            f"<figure><figcaption>{name}</figcaption>{_image(picture, f'{clip.key}: {name}')}</figure>"
            for name, picture in pictures.items()
        )
        yield f'<div class="clip">{figures}</div>'
    yield (
        "<h2>Cameras</h2><p>The camera's path from above: true in white, predicted in colour, from blue to orange.</p>"
        '<div class="grid">'
    )
    for clip in report.clips[:4]:
        yield f"<figure>{_image(camera_sheet(clip.after), f'{clip.key}: camera path')}</figure>"
    yield "</div>"


def _predicted(seen: Scene, scale: DepthScale) -> Picture:
    known = np.isfinite(seen.depth_predicted) & (seen.depth_predicted > 0)
    return depth_picture(seen.depth_predicted, known, scale)


def _cloud(clip: Clip) -> str:
    found = clouds(clip)
    if not found:
        return ""
    buttons = "".join(
        f'<button type="button" data-cloud="{index}" aria-pressed="{str(not index).lower()}">{cloud.name}</button>'
        for index, cloud in enumerate(found)
    )
    data = json.dumps([_packed(cloud) for cloud in found])
    return (
        f"<h2>Points</h2><p>A frame of {escape(clip.key)} in space, in the colours of the video: where the network's depth and "
        "camera put its pixels, where its point head puts them, and where they are. The point head is judged as a cloud, so it "
        "may give a pixel's place to another.</p>"
        f'<div class="cloud">{buttons}<canvas tabindex="0" aria-label="point cloud"></canvas>'
        '<p class="faint hint">Drag to turn, shift and drag to move, wheel to come nearer; arrow keys turn as well.</p>'
        f'<script type="application/json">{data}</script></div>'
    )


def _packed(cloud: Cloud) -> dict[str, str]:
    return {
        "name": cloud.name,
        "places": base64.b64encode(cloud.places.astype("<i2").tobytes()).decode(),
        "colours": base64.b64encode(cloud.colours.tobytes()).decode(),
    }


def _sample(folder: Path) -> str:
    videos = "".join(
        f'<figure><figcaption>{name}</figcaption><video controls loop muted autoplay src="{_data(folder / file, "video/mp4")}">'
        "</video></figure>"
        for file, name in SAMPLE_VIDEOS.items()
        if (folder / file).is_file()
    )
    sheet = folder / "contact_sheet.png"
    picture = f'<img alt="frames of the clip" src="{_data(sheet, "image/png")}">' if sheet.is_file() else ""
    return f'<h2>A generated clip</h2><div class="grid">{videos}</div>{picture}'


def _curves(history: History, constant: Mapping[str, float]) -> str:
    steps = history.config.train.steps
    wanted = {f"{term}_loss": (name, constant.get(f"loss/{term}")) for term, name in TERMS.items()}
    charts = []
    for key, (name, level) in (wanted | {"diffusion": ("diffusion loss", None)}).items():
        series = [
            Series(label, curve.steps, curve.values, style)
            for label, style, curve in (
                ("training", "train", history.trained.get(f"loss/{key}")),
                ("held out", "valid", history.validated.get(f"validation/{key}")),
            )
            if curve
        ]
        if series and level is not None and history.stage == "stage1":
            series.append(Series("constant", (0, steps), (level, level), "constant"))
        charts.append(line_chart(name, series, steps))
    speed = history.trained.get("throughput/samples_per_s")
    if speed:
        charts.append(line_chart("samples a second", [Series("training", *speed, "train")], steps))
    title = f"{history.folder.name}: {STAGES[history.stage]}"
    return f'<h2>{escape(title)}</h2><div class="grid">{"".join(charts)}</div>'


def _configuration(history: History) -> str:
    return (
        f"<details><summary>{escape(history.folder.name)}</summary><pre>{escape(history.config_text)}</pre></details>"
    )


def _image(picture: Picture, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png_bytes(picture)).decode()}">'


def _data(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
