"""Audit a packed dataset: do video, depth, points and cameras of each clip belong together?

    fw data audit packed/
    fw data audit packed/ --clips 200            # of a large dataset, spread evenly
    fw data audit packed/ --quarantine none      # look, and quarantine nothing

Depth is unprojected with the camera (after a fit of scale and shift where its kind is affine) and compared with the points.
Where they disagree, the mistake that explains it is named: swapped c2w and w2c, transposed rotations, intrinsics of another
convention, other axes or scales. It also finds NaN and missing labels, frozen frames, duplicates and missing captions.

Each finding is a line with clip, fault and evidence. OUT/audit.html shows them in pictures, OUT/audit.jsonl has a line for each
clip, and OUT/quarantine.jsonl lists the clips that the loader leaves out: lines that people added to it stay. Its copy,
OUT/audit.quarantine.jsonl, tells later whether lines were lost. The exit code is 1 if a serious fault is found; missing captions
and duplicates are warnings.
"""

import argparse
import json
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data_tools.audit_checks import FAULTS, Finding
from data_tools.audit_clip import ClipAudit, Limits, audit_clip
from data_tools.audit_pictures import ClipPictures, draw_clip
from data_tools.audit_report import report_html
from data_tools.work import Progress, add_workers, run_parallel
from fw_train.atomic_files import write_file
from fw_train.data.manifest import Dataset
from fw_train.data.quarantine import (
    QUARANTINE,
    WRITTEN,
    QuarantineEntry,
    lost_entries,
    read_quarantine,
    write_quarantine,
)

log = logging.getLogger(__name__)

REPORT, NUMBERS = "audit.html", "audit.jsonl"
SERIOUS = tuple(name for name, fault in FAULTS.items() if fault.serious)
HEALTHY = 4  # clips without findings that are pictured


class Job(NamedTuple):
    folder: str
    row: int
    limits: Limits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder that `fw data pack` wrote")
    parser.add_argument("--clips", type=_count, metavar="N", help="audit N clips, spread evenly (default: all)")
    parser.add_argument(
        "--quarantine",
        type=fault_names,
        default=SERIOUS,
        metavar="FAULTS",
        help=f"faults for which a clip is left out, separated by commas, `all` or `none` (default: {','.join(SERIOUS)})",
    )
    parser.add_argument(
        "--tolerance",
        type=_share,
        default=0.1,
        metavar="X",
        help="relative error of unprojected depth against points that counts as agreement (default 0.1)",
    )
    parser.add_argument(
        "--min-coverage",
        type=_share,
        default=0.05,
        metavar="X",
        help="valid pixels in each frame, as a fraction (0.05)",
    )
    parser.add_argument(
        "--pictures", type=int, default=40, metavar="N", help="clips to picture, faulty ones first (40)"
    )
    add_workers(parser, "one clip each")


def run(args: argparse.Namespace) -> int:
    dataset = Dataset(args.out)
    total, keys = len(dataset), {dataset.sample(row).key for row in range(len(dataset))}
    dataset.close()
    old = read_quarantine(args.out)  # a damaged list is noticed before the work
    for entry in old:
        if entry.key not in keys:
            log.warning("%s names %s, which the dataset does not have", args.out / QUARANTINE, entry.key)
    rows = range(total) if args.clips is None else even_rows(total, args.clips)
    refuse_lost(args.out, keys, all_clips=args.clips is None)
    audits = audit(args.out, rows, Limits(args.tolerance, args.min_coverage), args.workers)
    for clip in audits:
        for found in clip.findings:
            print(f"{clip.key}: {found.fault}: {found.detail}")
    entries = merge(old, audits, args.quarantine)
    quarantined = {entry.key for entry in entries} & {clip.key for clip in audits}
    pictures = draw(args.out, pictured(audits, args.pictures), Limits(args.tolerance, args.min_coverage), args.workers)
    title = f"{args.out.resolve().name}"
    write_file(args.out / NUMBERS, "".join(f"{json.dumps(numbers(clip))}\n" for clip in audits).encode())
    write_file(args.out / REPORT, report_html(title, audits, pictures, quarantined).encode())
    if entries or old or (args.out / WRITTEN).exists():
        write_quarantine(args.out, entries)
    serious = sum(any(FAULTS[found.fault].serious for found in clip.findings) for clip in audits)
    warned = sum(bool(clip.findings) for clip in audits) - serious
    print(
        f"{args.out}: {len(audits)} clips, {serious} with faults, {warned} with warnings, {len(quarantined)} in quarantine; "
        f"see {args.out / REPORT}"
    )
    return int(serious > 0)


def refuse_lost(folder: Path, keys: Collection[str], all_clips: bool) -> None:
    """Refuses a list that lost lines which this audit will not find again: writing it would make that look intended."""
    lost = [entry for entry in lost_entries(folder, keys) if not (all_clips and entry.fault in FAULTS)]
    if lost:
        raise ValueError(
            f"{folder / QUARANTINE} has lost {len(lost)} lines, the first for {lost[0].key} ({lost[0].fault}); copy them back from "
            f"{folder / WRITTEN}, or take them out there too if that is meant"
        )


def audit(folder: Path, rows: Sequence[int], limits: Limits, workers: int = 1) -> list[ClipAudit]:
    """The findings of the clips in these rows, duplicates among them too."""
    jobs = [Job(str(folder), row, limits) for row in rows]
    with Progress(len(jobs), "clips") as progress:
        return find_duplicates(list(run_parallel(_audit, jobs, workers, progress)))


def draw(folder: Path, rows: Sequence[int], limits: Limits, workers: int = 1) -> dict[int, ClipPictures]:
    """The pictures of the clips in these rows."""
    jobs = [Job(str(folder), row, limits) for row in rows]
    with Progress(len(jobs), "clips pictured") as progress:
        return dict(zip(rows, run_parallel(_draw, jobs, workers, progress), strict=True))


def pictured(audits: Sequence[ClipAudit], most: int) -> list[int]:
    """The rows to draw: faulty clips first, then a few others spread evenly."""
    readable = [clip for clip in audits if clip.facts]
    serious = [clip.row for clip in readable if any(FAULTS[found.fault].serious for found in clip.findings)]
    warned = [clip.row for clip in readable if clip.findings and clip.row not in set(serious)]
    healthy = [clip.row for clip in readable if not clip.findings]
    sample = [healthy[at] for at in even_rows(len(healthy), HEALTHY)]
    return [*serious, *warned, *sample][:most]


def find_duplicates(audits: Sequence[ClipAudit]) -> list[ClipAudit]:
    """Adds a finding to each clip whose video an earlier one has."""
    first: dict[str, str] = {}
    result = []
    for clip in audits:
        if clip.facts and first.setdefault(clip.facts.video_sha256, clip.key) != clip.key:
            twin = Finding("duplicate-clip", f"its video is that of {first[clip.facts.video_sha256]}, byte for byte")
            clip = clip._replace(findings=(*clip.findings, twin))
        result.append(clip)
    return result


def merge(
    old: Iterable[QuarantineEntry], audits: Sequence[ClipAudit], chosen: Sequence[str]
) -> tuple[QuarantineEntry, ...]:
    """The list after an audit: its own lines about the audited clips are new, all others stay."""
    audited = {clip.key for clip in audits}
    kept = [entry for entry in old if entry.fault not in FAULTS or entry.key not in audited]
    new = [QuarantineEntry(clip.key, *found) for clip in audits for found in clip.findings if found.fault in chosen]
    return (*kept, *new)


def numbers(clip: ClipAudit) -> dict[str, Any]:
    """The line of a clip in `audit.jsonl`; errors that are not finite are null."""
    line: dict[str, Any] = {"key": clip.key, "findings": [found._asdict() for found in clip.findings]}
    facts = clip.facts
    if facts is None:
        return line
    errors = {"error": facts.error, "repaired_error": facts.repaired_error}
    return line | {
        **{name: float(f"{error:.4g}") if error < np.inf else None for name, error in errors.items()},
        "coverage": float(f"{facts.coverage.mean():.4g}"),
        "min_coverage": float(f"{facts.coverage.min():.4g}"),
        "picture_change": float(f"{np.median(facts.change):.4g}") if len(facts.change) else 0.0,
        "camera_motion_px": float(f"{facts.motion_px.sum():.4g}"),
    }


def even_rows(total: int, count: int) -> list[int]:
    """At most `count` of `total` rows, evenly apart."""
    return (np.arange(min(count, total)) * total // max(1, min(count, total))).tolist()


def fault_names(text: str) -> tuple[str, ...]:
    if text in ("all", "none"):
        return tuple(FAULTS) if text == "all" else ()
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: the faults are {', '.join(FAULTS)}, or `all` or `none`"
        )
    return names


@cache
def _dataset(folder: str) -> Dataset:
    torch.set_num_threads(1)  # there is a process for each core already
    return Dataset(folder)


def _audit(job: Job, advance: Callable[[int], None]) -> ClipAudit:
    result = audit_clip(_dataset(job.folder), job.row, job.limits)
    advance(1)
    return result


def _draw(job: Job, advance: Callable[[int], None]) -> ClipPictures:
    result = draw_clip(_dataset(job.folder), job.row, job.limits)
    advance(1)
    return result


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} is not at least 1")
    return count


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text} is a fraction, from 0 to less than 1")
    return share
