"""The audit as one HTML file that needs nothing else: no network, no scripts, light and dark."""

import base64
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from data_tools.audit_checks import FAULTS, Float, percent
from data_tools.audit_clip import ClipAudit, ClipFacts
from data_tools.audit_pictures import ERRORS, ClipPictures, error_colours
from data_tools.preview import height_text, length_text, smallest_shown, unit_of
from fw_train.pictures.camera_path import CameraPath

MAP, PADDING, WEDGE = 240, 26, 13  # units of the drawing of a path
CHART_WIDTH, CHART_HEIGHT = 320, 34
LISTED = 200  # clips without pictures whose names are listed


def report_html(
    title: str, audits: Sequence[ClipAudit], pictures: Mapping[int, ClipPictures], quarantined: Collection[str]
) -> str:
    """The report of the audited clips; `pictures` by row, `quarantined` are keys."""
    shown = [audit for audit in audits if audit.row in pictures or (audit.findings and audit.facts is None)]
    shown.sort(key=lambda audit: (not audit.findings, audit.row))
    cards = "".join(_card(audit, pictures.get(audit.row), audit.key in quarantined) for audit in shown)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Audit of {escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body><main>'
        f"<h1>Audit of {escape(title)}</h1>{_summary(audits, quarantined)}{_table(audits)}"
        f"{_legend()}<h2>Clips</h2>{cards}{_rest(audits, {audit.row for audit in shown})}</main></body></html>\n"
    )


def _summary(audits: Sequence[ClipAudit], quarantined: Collection[str]) -> str:
    faulty = sum(any(FAULTS[found.fault].serious for found in audit.findings) for audit in audits)
    warned = sum(bool(audit.findings) for audit in audits) - faulty
    numbers = (
        (len(audits), "clips audited", ""),
        (len(audits) - faulty - warned, "without findings", "good"),
        (faulty, "with faults", "bad" if faulty else ""),
        (warned, "with warnings alone", "warn" if warned else ""),
        (len(quarantined), "in quarantine", ""),
    )
    tiles = "".join(
        f'<div class="tile {kind}"><b>{count}</b><span>{text}</span></div>' for count, text, kind in numbers
    )
    return f'<div class="tiles">{tiles}</div>'


def _table(audits: Sequence[ClipAudit]) -> str:
    counts = Counter(name for audit in audits for name in {found.fault for found in audit.findings})
    if not counts:
        return '<p class="fine">Nothing was found: video, depth, points and cameras of all clips belong together.</p>'
    rows = "".join(
        f'<tr><td class="number">{counts[name]}</td><td><span class="tag {_kind(name)}">{name}</span></td>'
        f"<td>{escape(fault.title)}</td><td>{_prose(fault.remedy)}</td></tr>"
        for name, fault in FAULTS.items()
        if name in counts
    )
    return (
        '<div class="wide"><table class="faults"><thead><tr><th class="number">clips</th><th>fault</th><th>what it means</th>'
        f"<th>remedy</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _legend() -> str:
    colours = ", ".join(f"rgb{tuple(map(int, colour))}" for colour in error_colours(np.geomspace(*ERRORS, 12)))
    return (
        f'<p class="legend"><span>relative error {100 * ERRORS[0]:g} %</span>'
        f'<span class="bar" style="background:linear-gradient(90deg,{colours})"></span><span>{100 * ERRORS[1]:g} %</span>'
        "<span>&ensp;grey: no label</span></p>"
    )


def _card(audit: ClipAudit, pictures: ClipPictures | None, quarantined: bool) -> str:
    tags = "".join(
        f'<span class="tag {_kind(name)}">{name}</span>' for name in {found.fault: 0 for found in audit.findings}
    )
    if not audit.findings:
        tags = '<span class="tag good">no findings</span>'
    if quarantined:
        tags += '<span class="tag plain">quarantined</span>'
    findings = "".join(
        f'<div class="finding {_kind(found.fault)}"><p><b>{escape(FAULTS[found.fault].title)}:</b> {escape(found.detail)}.</p>'
        f'<p class="remedy">{_prose(FAULTS[found.fault].remedy)}</p></div>'
        for found in audit.findings
    )
    body = _body(audit.facts, pictures) if audit.facts and pictures else ""
    return f'<article id="{audit.key}"><header><h3>{audit.key}</h3>{tags}</header>{findings}{body}</article>'


def _body(facts: ClipFacts, pictures: ClipPictures) -> str:
    info = facts.info
    text = (
        f"{info.height}x{info.width}, {info.frames} frames at {info.fps:g} fps, depth {info.depth_kind}, scene scale "
        f"{info.scene_scale:.4g}" + (f", source {info.source}" if info.source else "")
    )
    heads = "".join(f"<th>frame {frame}</th>" for frame in pictures.frames)
    rows = "".join(
        f"<tr><th>{row.label}</th>"
        + "".join(f'<td><img alt="" src="{_uri(data)}"></td>' for data in row.pictures)
        + "</tr>"
        for row in pictures.rows
    )
    path = _path_svg(pictures.path, pictures.repaired, info.scene_scale, unit_of(info))
    caption = f"<q>{escape(info.caption)}</q>" if info.caption else "(no caption)"
    return (
        f'<p class="caption">{caption}<br><span>{escape(text)}</span></p><div class="evidence">'
        f'<div class="wide sheet"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<div class="side">{path}{_charts(facts)}</div></div>'
    )


def _charts(facts: ClipFacts) -> str:
    """What happens from frame to frame."""
    errors = "".join(
        f"<tr><td>frame {frame}</td><td>{_percent(error)}</td></tr>"
        for frame, error in zip(facts.chosen, facts.frame_errors, strict=True)
    )
    repaired = "" if facts.repaired_error == facts.error else f", repaired {_percent(facts.repaired_error)}"
    return (
        _chart("picture changes", facts.change, "greys")
        + _chart("camera moves", facts.motion_px, "px")
        + _chart("valid pixels", 100 * facts.coverage, "%")
        + f"<details><summary>error {_percent(facts.error)} in the worst frame{repaired}</summary>"
        f"<table>{errors}</table></details>"
    )


def _chart(label: str, values: Float, unit: str) -> str:
    """Bars, one for each frame."""
    if not len(values):
        return ""
    top, width = max(float(values.max()), 1e-9), CHART_WIDTH / len(values)
    bars = "".join(
        f"M{at * width:.1f} {CHART_HEIGHT}v{-max(CHART_HEIGHT * value / top, 0.6):.1f}h{0.8 * width:.2f}V{CHART_HEIGHT}"
        for at, value in enumerate(values)
    )
    return (
        f"<figure><figcaption>{label}<span>{values.min():.3g} to {values.max():.3g} {unit}</span></figcaption>"
        f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" preserveAspectRatio="none" class="chart"><path d="{bars}"/></svg>'
        "</figure>"
    )


def _path_svg(given: CameraPath, repaired: CameraPath | None, scene_scale: float, unit: str) -> str:
    """Cameras from above, x to the right and z up, with triangles along their view; the repaired path is dashed."""
    paths = {"given": given} if repaired is None else {"given": given, "repaired": repaired}
    places = np.concatenate([path.centres[:, (0, 2)] for path in paths.values()])
    low, high = places.min(axis=0), places.max(axis=0)
    reach = max(float((high - low).max()), smallest_shown([*paths.values()], scene_scale))
    shown = reach * MAP / (MAP - 2 * PADDING)

    def to_map(at: NDArray[np.floating]) -> NDArray[np.floating]:
        return MAP / 2 + (at - (low + high) / 2) * (MAP / shown) * np.array((1, -1))

    drawn = "".join(
        _track(to_map(path.centres[:, (0, 2)]), path.forward[:, (0, 2)], kind) for kind, path in paths.items()
    )
    facts = "".join(
        f"<div>{'' if repaired is None else f'{kind}: '}length {length_text(path)}{unit}, "
        f"height {height_text(path)}{unit}</div>"
        for kind, path in paths.items()
    )
    dashed = "" if repaired is None else "dashed: repaired, "
    return (
        f"<figure><figcaption>camera from above<span>{dashed}{shown:.3g}{unit} wide</span></figcaption>"
        f'<svg viewBox="0 0 {MAP} {MAP}" class="map">{drawn}</svg><div class="facts">{facts}</div></figure>'
    )


def _track(places: NDArray[np.floating], ahead: NDArray[np.floating], kind: str) -> str:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    wedges = ""
    for t in np.linspace(0, len(places) - 1, min(5, len(places))).astype(int):
        direction = ahead[t] * np.array((1, -1)) * WEDGE
        across = np.array((-direction[1], direction[0])) / 2
        corners = np.stack((places[t], places[t] + direction + across, places[t] + direction - across))
        wedges += f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in corners)}"/>'
    (x, y), (end_x, end_y) = places[0], places[-1]
    return (
        f'<g class="{kind}">{wedges}<polyline points="{line}"/><circle class="first" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
        f'<circle cx="{end_x:.1f}" cy="{end_y:.1f}" r="3"/></g>'
    )


def _rest(audits: Sequence[ClipAudit], shown: Collection[int]) -> str:
    rest = [audit for audit in audits if audit.findings and audit.row not in shown]
    if not rest:
        return ""
    lines = "".join(
        f"<tr><td>{audit.key}</td><td>{found.fault}</td><td>{escape(found.detail)}</td></tr>"
        for audit in rest[:LISTED]
        for found in audit.findings
    )
    more = f"<p>and {len(rest) - LISTED} more, see audit.jsonl</p>" if len(rest) > LISTED else ""
    return f'<h2>{len(rest)} more clips with findings</h2><div class="wide"><table class="faults">{lines}</table></div>{more}'


def _prose(text: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _kind(fault: str) -> str:
    return "bad" if FAULTS[fault].serious else "warn"


def _uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _percent(share: float) -> str:
    return percent(share) if share < np.inf else "impossible"


_STYLE = """
:root{--ink:#1d2129;--faint:#667080;--page:#f5f6f8;--card:#fff;--line:#dfe3e9;--good:#17803d;--bad:#c2261d;--warn:#a05a00;
--given:#2563c9;--repaired:#17803d;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--faint:#97a1b0;--page:#14161a;--card:#1d2026;--line:#333943;
--good:#4cc878;--bad:#ff7a6e;--warn:#f0b050;--given:#6fa8ff;--repaired:#4cc878}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:25px;margin:0 0 18px;overflow-wrap:anywhere}h2{font-size:19px;margin:30px 0 12px}
h3{font:600 16px ui-monospace,monospace;margin:0;overflow-wrap:anywhere}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin-bottom:18px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:9px;padding:10px 18px;min-width:130px}
.tile b{display:block;font-size:25px;line-height:1.25}.tile span{color:var(--faint)}
.good b{color:var(--good)}.bad b{color:var(--bad)}.warn b{color:var(--warn)}
.wide{overflow-x:auto}
table{border-collapse:collapse}th{text-align:left;color:var(--faint);font-weight:500}
.faults{width:100%;background:var(--card);border:1px solid var(--line);border-radius:9px}
.faults td,.faults th{padding:7px 12px;border-top:1px solid var(--line);vertical-align:top}
.faults thead th{border-top:0}.number{text-align:right!important;font-variant-numeric:tabular-nums}
.tag{display:inline-block;font:600 12.5px/1.6 ui-monospace,monospace;padding:0 8px;border-radius:20px;border:1px solid;
white-space:nowrap}
.tag.good{color:var(--good)}.tag.bad{color:var(--bad)}.tag.warn{color:var(--warn)}.tag.plain{color:var(--faint)}
.legend{display:flex;align-items:center;gap:9px;color:var(--faint);font-size:13px}
.legend .bar{width:180px;height:11px;border-radius:3px}
.fine{color:var(--good)}
article{background:var(--card);border:1px solid var(--line);border-radius:9px;padding:16px 18px;margin-bottom:18px}
article header{display:flex;flex-wrap:wrap;gap:9px;align-items:center;margin-bottom:8px}
.finding{border-left:3px solid;padding-left:11px;margin:9px 0}.finding.bad{border-color:var(--bad)}
.finding.warn{border-color:var(--warn)}.finding p{margin:0}.remedy{color:var(--faint)}
.caption{margin:10px 0}.caption span{color:var(--faint);font-size:13px}
.evidence{display:flex;flex-wrap:wrap;gap:22px}
.sheet{flex:1 1 560px}.sheet table{width:100%}.sheet th{font-size:13px;padding-right:8px}.sheet td{padding:2px;width:24%}
.sheet img{display:block;width:100%;border-radius:3px}
.side{flex:0 1 300px}figure{margin:0 0 11px}
figcaption{display:flex;justify-content:space-between;font-size:13px;gap:8px;white-space:nowrap}
figcaption span{color:var(--faint);text-align:right}
.map{width:100%;background:var(--page);border:1px solid var(--line);border-radius:6px}
.map polyline{fill:none;stroke-width:2}.map polygon{stroke:none;opacity:.45}
.given polyline{stroke:var(--given)}.given polygon,.given circle{fill:var(--given)}
.repaired polyline{stroke:var(--repaired);stroke-dasharray:5 4}.repaired polygon,.repaired circle{fill:var(--repaired)}
.facts{color:var(--faint);font-size:13px}
.map .first{fill:var(--card);stroke:var(--ink);stroke-width:2}
.chart{display:block;width:100%;height:34px}.chart path{fill:var(--given)}
code{font:0.92em ui-monospace,monospace}
details{font-size:13px;color:var(--faint)}details td{padding-right:16px}
"""
