"""Say what a packed dataset holds: sizes and lengths, bytes, compression, label errors, captions, and what is encoded.

    fw data info packed/

Reads the manifests alone; `fw data verify` checks that it is true.
"""

import argparse
from pathlib import Path

from fw_train.data.manifest import REJECTS, Dataset, LabelTotals, Totals
from fw_train.data.sidecar_files import read_manifest
from fw_train.data.sidecar_tensor import KINDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder that `fw data pack` wrote")


def run(args: argparse.Namespace) -> int:
    dataset = Dataset(args.out)
    header, shards = dataset.manifest.header, dataset.manifest.shards
    totals = dataset.manifest.totals
    tar_bytes = sum(line.tar_bytes for line in shards)
    print(f"{args.out}: {len(dataset)} samples in {len(shards)} shards, {_size(tar_bytes)}")
    frames = f"first {header.settings.frames} frames" if header.settings.frames else "all frames"
    print(f"packed with preset {header.settings.preset}, {frames}, up to {header.settings.shard_size} samples a shard")

    print(f"\n{'height x width x frames':<26}{'samples':>10}{'shards':>8}{'bytes':>12}{'a sample':>12}{'labels':>9}")
    for rows in dataset.buckets:
        lines = [line for line in shards if line.bucket == rows.bucket]
        bucket = sum((line.totals for line in lines), Totals())
        size = sum(line.tar_bytes for line in lines)
        each = _size(size / rows.samples) if rows.samples else "-"
        ratio = f"{_ratio(_together(bucket)):.1f}x"
        print(f"{rows.bucket:<26}{rows.samples:>10}{len(lines):>8}{_size(size):>12}{each:>12}{ratio:>9}")

    print(f"\n{'':<10}{'bytes':>12}{'raw float32':>14}{'smaller':>9}{'max error':>12}{'lossless frames':>18}")
    for name, label in (("depth", totals.depth), ("points", totals.points), ("labels", _together(totals))):
        lossless = f"{label.lossless_frames} of {label.frames}"
        print(
            f"{name:<10}{_size(label.encoded_bytes):>12}{_size(label.raw_bytes):>14}{_ratio(label):>8.1f}x"
            f"{label.max_rel_error:>12.2e}{lossless:>18}"
        )
    print(f"{'video':<10}{_size(totals.video_bytes):>12}")
    print(f"\ncaptions missing: {totals.captions_missing}")
    print(f"clips rejected: {header.rejects}" + (f" ({args.out / REJECTS})" if header.rejects else ""))
    _print_sidecars(dataset)
    return 0


def _print_sidecars(dataset: Dataset) -> None:
    for kind in KINDS:
        folder = dataset.folder / kind
        if not folder.is_dir():
            continue
        try:
            manifest = read_manifest(folder, kind)
        except ValueError as error:
            print(f"\n{kind}: {error}")
            continue
        facts = ", ".join(f"{name} {value}" for name, value in manifest.facts.items())
        size = _size(sum(line.tar_bytes for line in manifest.shards))
        stale = manifest.header.dataset_sha256 != dataset.manifest.header.rows_sha256
        print(
            f"\n{kind}: {size}, fingerprint {manifest.header.fingerprint[:16]}{', of other samples than these' * stale}"
        )
        print(f"  {facts}")


def _together(totals: Totals) -> LabelTotals:
    return totals.depth + totals.points


def _ratio(label: LabelTotals) -> float:
    return label.raw_bytes / max(label.encoded_bytes, 1)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
