"""Train a stage: data, network, engine, then steps with their checkpoints, guards and figures, until done or told to stop.

    fw train configs/demo.yaml                                                  (one process)
    deepspeed --no_local_rank --module fw_train.train configs/stage1.yaml      (one host; several: launch/stage1.sh HOSTFILE)
    torchrun --nproc-per-node 8 -m fw_train.train configs/stage1.yaml
    srun python -m fw_train.train configs/stage1.yaml

Started again with the same configuration it goes on where it stopped, with the same samples and the same noise. SIGTERM,
SIGUSR1 or a file `stop` in the run's folder end it after the current step, saved. What became of a run stands in its
status.json: running, stopped, finished or failed.
"""

import argparse
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fw_train import dist
from fw_train.activation_checkpointing import apply_activation_checkpointing
from fw_train.arguments import add_config, read_config
from fw_train.batch import Batch
from fw_train.build import base_identity, load_model, world_params
from fw_train.checkpoint.loading import load, peek
from fw_train.checkpoint.run_state import RunState, capture_rng, restore_rng, seed_rng
from fw_train.checkpoint.saver import CheckpointSaver, CheckpointsFailing, StageWeights
from fw_train.code_version import code_version
from fw_train.config import Config, config_hash, to_tree
from fw_train.data.coded import Substituted
from fw_train.data.expand import expand_video
from fw_train.data.loader import too_many
from fw_train.data.order import Segment, accumulation_steps, change_global_batch
from fw_train.dist import World
from fw_train.engine import StepStats, make_engine
from fw_train.evaluation.validation import validate
from fw_train.inference import write_config
from fw_train.monitoring.facts import open_monitor, peak_memory_bytes, scene_of
from fw_train.monitoring.monitor import StepRecord
from fw_train.monitoring.step_clock import StepClock
from fw_train.monitoring.step_report import OwnStep, describe_bad_step, share
from fw_train.optimiser import learning_rate
from fw_train.plan.dry_run import dry_run
from fw_train.precision import PRECISIONS
from fw_train.run.data import BatchMaker, HeldOut, open_data
from fw_train.run.encodings import VALIDATION, check_encodings, encodings_of, encodings_of_weights
from fw_train.run.folder import RunFolder, State
from fw_train.run.params import engine_params, save_params, step_params
from fw_train.run.resume import check_configuration, check_data, data_facts
from fw_train.stages import apply_stage, gate_magnitudes, stage_rules
from fw_train.step import train_step
from fw_train.watch.fingerprints import Replicas, frozen_fingerprint
from fw_train.watch.guards import SpikeGuard, Stragglers
from fw_train.watch.stop import StopRequest, asked_by
from fw_train.watch.watcher import Watch
from fw_train.weights.stage import StageInfo

log = logging.getLogger(__name__)

DIFFUSION_BINS = "validation/diffusion_by_timestep"


class Outcome(NamedTuple):
    """How a run ended, as its status.json says."""

    state: State  # finished or stopped
    step: int
    reason: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fw_train.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    args, rest = parser.parse_known_args(arguments)
    args.overrides += rest
    try:
        return run(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"fw_train.train: {error}", file=sys.stderr)
        return 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--allow-change",
        metavar="FIELD",
        action="append",
        default=[],
        help="resume although this field, which changes the numbers, differs from the checkpoint's, or start although what it "
        "names was encoded otherwise than the data; may be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="check all that a start needs, and take no step")
    parser.add_argument("--world", type=int, metavar="N", help="GPUs that --dry-run plays through (default 1)")


def run(args: argparse.Namespace) -> int:
    """Joins the other ranks, trains, and ends the process; what became of it stands in status.json."""
    config = read_config(args)
    if args.dry_run:
        return dry_run(config, args.allow_change, 1 if args.world is None else args.world)
    if args.world is not None:
        raise ValueError("--world belongs to --dry-run: a launcher says how many GPUs train")
    output, guard = Path(config.run.output), config.guard
    rank = dist.world_from_env(os.environ).rank
    _log_as(rank)
    with StopRequest(output) as stop:
        folder = RunFolder.claim(output) if rank == 0 else None
        world = dist.start(guard.collective_s)
        watch = Watch(output, world.rank, world.size, hang_s=guard.hang_s, first_step_s=guard.first_step_s)
        try:
            outcome = train(config, frozenset(args.allow_change), world, folder, stop, watch)
        except BaseException as error:
            if isinstance(error, torch.OutOfMemoryError):
                error.add_note(
                    "What needs less memory: train.activation_checkpointing=full, train.micro_batch=1, fewer data.frames, "
                    "engine.zero_stage=3 or engine.kind=fsdp2"
                )
            watch.fail(error)
        log.info("%s at step %d%s", outcome.state, outcome.step, f": {outcome.reason}" if outcome.reason else "")
        dist.barrier()  # whoever has closed its watch looks after nobody
        watch.close()
        if folder:
            folder.status(outcome.state, outcome.step, outcome.reason)
            folder.release()
    return dist.finish(world)


def train(
    config: Config, allowed: frozenset[str], world: World, folder: RunFolder | None, stop: StopRequest, watch: Watch
) -> Outcome:
    """The whole run; every rank calls it, and all take the same steps."""
    output, steps, device = Path(config.run.output), config.train.steps, world.device

    def told_to_stop() -> bool:
        """Whether any rank was, in the phases that have no step to end."""
        return bool(dist.all_max(torch.tensor([float(stop.requested)])) > 0)

    def stopped(step: int, when: str = "") -> Outcome:
        """The same on every rank, whichever was told."""
        return Outcome("stopped", step, asked_by(dist.gather_texts(stop.reason)) + when)

    # ---------------------------------------------------------------- What the run did before
    watch.beat("looking for a checkpoint")
    accumulate = accumulation_steps(config.train.global_batch, world.size, config.train.micro_batch)
    identity = dist.gather_texts(base_identity(config) if world.rank == 0 else "")[0]
    before = peek(output, config.run.resume) if config.run.resume != "never" else None
    if before is not None:  # before anything is allocated
        check_configuration(before.manifest.run_state(rng=None), config, allowed, identity)
    step = before.step if before else 0
    seed_rng(config.train.seed, world.rank)
    if folder:
        folder.status("running", step, "")
        write_config(output, config)
    if told_to_stop():
        return stopped(step, ", before the start")

    # ---------------------------------------------------------------- Data
    watch.beat("opening the data")
    wan = world_params(config).wan
    data = open_data(config, wan)
    make_batch = BatchMaker(config, wan, device)
    held_out = HeldOut(config, wan, world.rank, world.size) if config.data.validation else None
    encodings = encodings_of(data, wan, make_batch.codec)
    others = {VALIDATION: held_out.encodings if held_out else None, **encodings_of_weights(config)}
    check_encodings(config, encodings, others, allowed)
    if data.empty_text is None:
        raise ValueError("the data have no texts; make them with `fw data encode`")
    empty_text = data.empty_text.to(device)

    # ---------------------------------------------------------------- Network and engine
    watch.beat("building the network")
    model = load_model(config, device, identity)
    groups = apply_stage(model, stage_rules(config.train.stage, config.train.gate_lr_scale))
    apply_activation_checkpointing(model.shard_units(), config.train.activation_checkpointing)
    watch.beat("starting the engine")
    engine = make_engine(model, groups, engine_params(config, accumulate), world)
    frozen, replicas = frozen_fingerprint(engine.module), Replicas(engine.module)
    params = step_params(config)
    spikes = SpikeGuard(config.guard.spike_window, config.guard.spike_deviations, config.guard.max_bad_steps)

    # ---------------------------------------------------------------- Resume
    watch.beat("loading the checkpoint")
    segments: tuple[Segment, ...] = (Segment(0, config.train.global_batch),)
    state = load(output, config.run.resume, engine.fragments(), world) if before else None
    if state is not None:
        check_configuration(state, config, allowed, identity)  # run.resume=auto may have fallen back to another one
        check_data(state, data, encodings, allowed)
        engine.restore(state.optimiser_steps, state.scaler_state)
        spikes.restore(state.guard)
        step = state.step
        segments = change_global_batch(state.segments, step, config.train.global_batch)
        if state.rng is not None:
            restore_rng(state.rng)
    if told_to_stop():
        return stopped(step, ", before the first step")

    # ---------------------------------------------------------------- Figures and saves
    version = code_version()
    monitor = open_monitor(output, config, world, version, first_step=step)
    stragglers = Stragglers(world.size)
    if state is not None:
        monitor.event(
            step, f"resumed on {world.size} ranks with {version}; saved on {state.world_size} with {state.code_version}"
        )
    saver = CheckpointSaver(output, world, save_params(config), resumed_step=step)
    saved_step = step if state else -1

    def save(step: int) -> float:
        """Starts a save of the state after `step` steps, and says how long training stood still for it."""
        watch.beat("saving", step)
        began = time.perf_counter()
        if not dist.all_equal(str(frozen_fingerprint(engine.module) == frozen)):
            raise RuntimeError("frozen weights have changed on some ranks: a program or a GPU is at fault")
        if folder and not folder.still_mine():
            raise RuntimeError(f"{output} was taken over by another start; this one must not write there any more")
        snapshot = RunState(
            step=step,
            segments=tuple((first, batch) for first, batch in segments),
            optimiser_steps=engine.optimiser_steps(),
            config=to_tree(config),
            base_hash=identity,
            data_fingerprint=data.fingerprint,
            data_facts=data_facts(data, encodings),
            scaler_state=engine.scaler_state(),
            guard=spikes.state(),
            code_version=version,
            world_size=world.size,
            rng=capture_rng(),
        )
        dtype = PRECISIONS[config.train.precision].params
        info = StageInfo(config.train.stage, step, config_hash(config), identity, dtype, encodings)
        weights = engine.trainable_weights()
        saver.save(step, engine.fragments(), snapshot, StageWeights(weights, info) if world.rank == 0 else None)
        return time.perf_counter() - began

    def save_last(step: int) -> None:
        """Returns when the state after `step` steps is on the disk."""

        def still_waiting() -> None:
            watch.beat("waiting for the checkpoint", step)

        ended = saver.wait(still_waiting)
        if ended is None or ended.step != step or ended.path is None:
            save(step)
            ended = saver.wait(still_waiting)
        if ended is None or ended.path is None:
            raise CheckpointsFailing(
                f"step {step} could not be saved: {ended.error if ended else 'nothing was written'}"
            )

    # ---------------------------------------------------------------- Validation and pictures
    def validate_now(step: int, *, diffusion: bool) -> bool:
        """Judges the network on the held-out clips; False where a stop cut it short."""
        assert held_out is not None
        stopped = False

        def clips() -> Iterator[tuple[Batch, bool]]:
            nonlocal stopped
            for coded, counts in held_out.batches():
                stopped = told_to_stop()
                if stopped:
                    return
                watch.beat("validating", step, coded.keys)
                yield make_batch(coded), counts

        result = validate(
            engine.module, clips(), seed=params.seed, dtype=params.dtype,
            geometry=params.stage != "stage0", diffusion=diffusion, all_sum=dist.all_sum,
        )  # fmt: skip
        if not stopped:
            bins = result.diffusion_bins
            monitor.validation(step, result.values, {DIFFUSION_BINS: bins} if bins else None)
        return not stopped

    def draw_now(step: int) -> None:
        """Pictures of the first held-out clip; sharded engines need all ranks for the forward pass."""
        assert held_out is not None
        watch.beat("drawing", step)
        clip = held_out.clip(0)
        monitor.pictures(step, scene_of(engine.module, make_batch(clip), expand_video(clip, device), params))

    # ---------------------------------------------------------------- Steps
    if held_out and step == 0 and (not validate_now(0, diffusion=True) or told_to_stop()):
        return stopped(0, ", before the first step")
    unread_total = drawn = 0
    batches = data.batches(
        segments, step, steps, rank=world.rank, world=world.size, micro_batch=config.train.micro_batch
    )
    with closing(batches), closing(monitor):
        while step < steps:
            rate = learning_rate(
                step, peak=config.train.learning_rate, warmup_steps=config.train.warmup_steps,
                total_steps=steps, schedule=config.train.schedule,
            )  # fmt: skip
            engine.set_learning_rate(rate)
            log_diffusion = step % config.train.diffusion_every_steps == 0
            clock, keys, unread = StepClock(device), list[str](), list[Substituted]()
            sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
            for _ in range(accumulate):
                watch.beat("data", step)
                coded = next(batches)
                clock.mark("data")
                keys += coded.keys
                unread += coded.substituted
                watch.beat("forward", step, keys)
                losses = train_step(engine.module, make_batch(coded), params, empty_text, log_diffusion=log_diffusion)
                clock.mark("forward")
                watch.beat("backward", step, keys)
                engine.backward(losses.total)
                clock.mark("backward")
                for name, value in losses.named().items():
                    sums[name] = sums[name] + value

            # All ranks learn the same about the step before anything is applied.
            watch.beat("agreeing", step, keys)
            times = clock.parts_s()
            due = world.rank == 0 and saver.due(step + 1, time.monotonic())
            own = OwnStep(sums, accumulate, stop.requested, due, len(unread), times["forward"], times["data"])
            all_ranks = share(own, world.rank, world.size, dist.all_sum)
            problem = spikes.judge(all_ranks.losses["loss/total"])
            if problem:
                engine.discard()
                stats = StepStats(applied=False, grad_norm=float("nan"))
            else:
                stats = engine.step(group_norms=(step + 1) % config.run.log_every_steps == 0)
                if not stats.applied:
                    problem = spikes.overrule(f"the gradient's norm is {stats.grad_norm}")
            clock.mark("optimiser")
            step += 1

            if problem:
                monitor.event(step, describe_bad_step(problem, own, keys, dist.gather_texts))
            if spikes.too_many:
                raise RuntimeError(
                    f"{spikes.bad} bad steps in a row, the last one: {problem}; see the samples named above"
                )
            unread_total, drawn = unread_total + all_ranks.substituted, drawn + config.train.global_batch
            if all_ranks.substituted:
                lines = dist.gather_texts("; ".join(f"{sample.key} ({sample.reason})" for sample in unread))
                monitor.event(step, f"samples that cannot be read: {'; '.join(filter(None, lines))}")
            if too_many(unread_total, drawn, config.data.max_substituted):
                raise RuntimeError(
                    f"{unread_total} of {drawn} samples could not be read, more than data.max_substituted="
                    f"{config.data.max_substituted:g}; check the data with `fw data verify`"
                )
            for slow in stragglers.add(step, all_ranks.compute_s):
                monitor.event(step, f"{slow}; {watch.whereabouts(slow.rank)}")
            agree_every = config.guard.agree_every_steps
            if agree_every and step % agree_every == 0:
                watch.beat("comparing weights", step)
                replicas.check()

            last, seconds, stall_s = step == steps, clock.total_s(), 0.0
            if (all_ranks.save_due or last or all_ranks.stop) and step != saved_step:
                stall_s, saved_step = save(step), step
            monitor.step(
                StepRecord(
                    step=step - 1,
                    losses=all_ranks.losses,
                    learning_rates={"base": rate, "gates": rate * config.train.gate_lr_scale},
                    grad_norm=stats.grad_norm,
                    group_norms=stats.group_norms,
                    gates=gate_magnitudes(engine.module) if step % config.run.log_every_steps == 0 else {},
                    applied=stats.applied,
                    reason=problem,
                    seconds=seconds,
                    data_wait_s=all_ranks.data_wait_s,
                    save_stall_s=stall_s,
                    peak_memory_bytes=peak_memory_bytes(device),
                    samples=config.train.global_batch,
                    substituted=all_ranks.substituted,
                    parts_s=clock.parts_s(),
                )
            )
            if folder and (stall_s or step % config.run.log_every_steps == 0):
                folder.status("running", step, "")
            if all_ranks.stop:
                break
            validate_every, draw_every = config.run.validate_every_steps, config.run.log_pictures_every
            if held_out and (last or (validate_every and step % validate_every == 0)):
                validate_now(step, diffusion=params.stage != "stage1")
            if held_out and params.stage != "stage0" and (last or (draw_every and step % draw_every == 0)):
                draw_now(step)

    save_last(step)
    saver.close()
    if step == steps:
        return Outcome("finished", step)
    return stopped(step)


def _log_as(rank: int) -> None:
    """Rank 0 talks; the others only where something is wrong, with their number in front."""
    prefix = "" if rank == 0 else f"[rank {rank}] "
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format=f"{prefix}%(message)s", force=True)


if __name__ == "__main__":
    sys.exit(main())
