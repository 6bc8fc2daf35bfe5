"""Write trained weights for other programs: with their base in one file or folder, or alone.

    fw export outputs/stage2/step-10000.safetensors --output fantasyworld.safetensors
    fw export outputs/stage2/step-10000.safetensors --output fantasyworld --format diffusers --dtype bf16 --max-shard 5GB
    fw export outputs/stage2/step-10000.safetensors --output trained.safetensors --trainable

An output that ends in .safetensors is one file; any other is a folder of shards with an index. The video transformer has the
names of Wan's authors or those of diffusers' WanTransformer3DModel (with a config.json that builds it); everything else is
named as in this project behind `geometry.`. A merged export is accepted as weights.base, and
`fw_train.export.tensors.load_export` makes the network from it alone. The configuration is found in the run's folder.
"""

import argparse
import logging
from pathlib import Path

from fw_train.export.tensors import Contents, plan_export
from fw_train.export.writing import parse_bytes, write_export
from fw_train.inference import config_of
from fw_train.precision import PRECISIONS
from fw_train.weights.stage import VIDEO_STAGE, read_stage_info

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a step-N.safetensors of a run")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="SECTION.KEY=VALUE",
        help="changes to its configuration, such as weights.base=FILE",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE|DIR", help="x.safetensors, or a folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--merged", action="store_true", help="with the base (default)")
    what.add_argument("--trainable", action="store_true", help="what the stage has trained, alone")
    parser.add_argument(
        "--format", choices=("original", "diffusers"), default="original", help="names (default original)"
    )
    parser.add_argument("--dtype", choices=sorted(PRECISIONS), help="default: as trained")
    parser.add_argument("--max-shard", default="5GB", metavar="SIZE", help="largest file of a folder (default 5GB)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: config.yaml in the checkpoint's folder")
    parser.add_argument("--force", action="store_true", help="replace an output that exists")


def run(args: argparse.Namespace) -> int:
    info = read_stage_info(args.checkpoint)
    contents: Contents = "trainable" if args.trainable else "merged"
    # The trained weights alone say all about themselves, unless diffusers is to build a network from them.
    needs_config = not args.trainable or (info.stage == VIDEO_STAGE and args.format == "diffusers")
    config = config_of(args.checkpoint, info, args.config, args.overrides) if needs_config else None
    dtype = PRECISIONS[args.dtype].params if args.dtype else None
    export = plan_export(args.checkpoint, config, contents, args.format, dtype)
    written = write_export(args.output, export, parse_bytes(args.max_shard), args.force)
    parameters = sum(tensor.parameters for tensor in export.tensors)
    log.info(
        "%s of %s, step %d: %d tensors, %s parameters, %s names, %s",
        contents, info.stage, info.step, len(export.tensors), f"{parameters:,}", args.format, export.metadata["dtype"],
    )  # fmt: skip
    for file in written:
        print(f"{file.sha256}  {file.path}  {file.size:,} bytes")
    return 0
