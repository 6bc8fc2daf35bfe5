"""Judging what was found on the machines: each function yields one check's verdicts."""

import re
from collections.abc import Iterator

from fw_train.devices import peak_flops
from launch.doctor_facts import Gemm, NodeFacts, Space
from launch.doctor_verdict import Case, Verdict, bytes_text, usual
from launch.remote import REMEDIES

GIB = 1 << 30
SHM_WITH_GPUS, SHM_WITHOUT = GIB, 16 << 20  # NCCL's buffers between GPUs of a node; semaphores of loader processes
OPEN_FILES = 4096
USED_MIB = 4096  # of a GPU's memory: a few contexts, and what the doctor's other ranks take
LEAST_OF_PEAK, LEAST_OF_OTHERS = 0.5, 0.85  # TFLOP/s
# What the agent itself may have run into, before what ssh may.
AGENT_REMEDIES = (
    ("s: importing", "the file system of the virtual environment is slow or has gone; a second try finds what it read"),
    ("s: (reading|looking)", "it hangs there: see on {host} whether that file system answers, and mount it anew"),
    ("s: (multiplying|asking)", "it hangs there: `nvidia-smi` and `dmesg | grep -i xid` on {host}"),
    ("did not come", "see what the launcher says of it, and try `fw doctor` on its node alone"),
    ("code .*(No such file|No module named)", "checkout and virtual environment are needed under the same path on every node"),
)  # fmt: skip
H20_CUBLAS = (12, 4, 5, 8)
# Bits of clocks_throttle_reasons that mean a machine in trouble; the others are idleness, settings and the power limit.
SLOWED = {0x8: "hardware slowdown", 0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake"}


def judge_answers(case: Case) -> Iterator[Verdict]:
    for node in case.nodes:
        if node.facts is not None:
            yield Verdict("answers", node.name, "ok", "")
            continue
        remedies = (*AGENT_REMEDIES, *REMEDIES)
        known = (remedy.format(host=node.name) for pattern, remedy in remedies if re.search(pattern, node.trouble))
        otherwise = f"try `ssh {node.name} true`, and take it out of the hostfile until it answers"
        yield Verdict("answers", node.name, "fail", node.trouble, next(known, otherwise))


def judge_code(case: Case) -> Iterator[Verdict]:
    same = usual(facts.tree for _, facts in case.looked_at)
    for name, facts in case.looked_at:
        found = f"{facts.version}, sources {facts.tree}"
        if facts.tree == same:
            yield Verdict("code", name, "ok", found)
        else:
            yield Verdict("code", name, "fail", f"{found}, most nodes have {same}", "the same commit on all nodes: keep the "
                          "checkout on a shared folder, or use one image")  # fmt: skip


def judge_packages(case: Case) -> Iterator[Verdict]:
    remedy = "`pip install -r requirements.txt` there; PYTHONPATH or ~/.local may hide the right one"
    names = {name for _, facts in case.looked_at for name, _ in facts.packages}
    same = {name: usual(dict(facts.packages).get(name) for _, facts in case.looked_at) for name in names}
    for node, facts in case.looked_at:
        wrong = [
            f"{name} {version}, elsewhere {same[name]}" for name, version in facts.packages if version != same[name]
        ]
        wrong += [f"{name} cannot be imported ({why})" for name, why in facts.broken]
        versions = dict(facts.packages)
        shown = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed") if name in versions)
        if wrong:
            yield Verdict("packages", node, "fail", "; ".join(wrong), remedy)
        else:
            yield Verdict("packages", node, "ok", shown)


def judge_gpus(case: Case) -> Iterator[Verdict]:
    kinds = {name: _gpu_kind(facts) for name, facts in case.looked_at}
    same = usual(kinds.values())
    for name, facts in case.looked_at:
        seen, slots = len(facts.gpus), case.slots.get(name, 0)
        if not facts.gpus and not same:
            yield Verdict("GPUs", name, "skip", f"CPU only: {facts.gpu_note}")
        elif not facts.gpus:
            yield Verdict("GPUs", name, "fail", f"none ({facts.gpu_note}); most nodes have {same}", "`nvidia-smi` there; in a "
                          "container give --gpus all")  # fmt: skip
        elif kinds[name] != same:
            yield Verdict("GPUs", name, "fail", f"{kinds[name]}; most nodes have {same}", "leave the node out, or find the "
                          "missing GPU: `dmesg | grep -i xid`")  # fmt: skip
        elif seen < slots:
            yield Verdict("GPUs", name, "fail", f"{kinds[name]}, and slots={slots}", f"slots={seen} in the hostfile")
        else:
            yield Verdict("GPUs", name, "ok", kinds[name])


def judge_gpu_memory(case: Case) -> Iterator[Verdict]:
    for name, facts in case.looked_at:
        used = [(gpu.index, gpu.used_mib or 0.0) for gpu in facts.gpus]
        full = [f"GPU {index}: {mib / 1024:.3g} GiB" for index, mib in used if mib > USED_MIB]
        if full:
            yield Verdict("GPU memory", name, "warn", f"in use already: {', '.join(full)}", "`nvidia-smi` names the processes; one "
                          "that an earlier run left has to be ended")  # fmt: skip
        elif facts.gpus:
            yield Verdict("GPU memory", name, "ok", "free")


def judge_drivers(case: Case) -> Iterator[Verdict]:
    with_gpus = [(name, facts) for name, facts in case.looked_at if facts.gpus]
    same = usual(facts.gpus[0].driver for _, facts in with_gpus) if with_gpus else ""
    for name, facts in with_gpus:
        driver = facts.gpus[0].driver
        if driver == same:
            yield Verdict("driver", name, "ok", driver)
        else:
            yield Verdict("driver", name, "warn", driver, f"most nodes have {same}: bring all to one version")


def judge_gemms(case: Case) -> Iterator[Verdict]:
    speeds = sorted(gemm.tflops for _, facts in case.looked_at for gemm in facts.gemms if gemm.tflops is not None)
    usual_speed = speeds[len(speeds) // 2] if speeds else 0.0
    for name, facts in case.looked_at:
        old = _old_cublas(facts)
        if old:
            yield Verdict("bf16 products", name, "fail", f"cuBLAS {facts.cublas} on H20", old)
        for gemm in facts.gemms:
            yield _judge_gemm(name, gemm, facts.cublas, usual_speed)


def judge_clocks(case: Case) -> Iterator[Verdict]:
    for name, facts in case.looked_at:
        wrong = [
            f"GPU {gpu.index}: {', '.join(text for bit, text in SLOWED.items() if gpu.slowed & bit)}"
            + (f" at {gpu.temperature_c:.0f} C" if gpu.temperature_c is not None else "")
            for gpu in facts.gpus
            if gpu.slowed is not None and any(gpu.slowed & bit for bit in SLOWED)
        ]
        fastest = max((gpu.max_clock_mhz or 0.0 for gpu in facts.gpus), default=0.0)
        wrong += [f"GPU {gpu.index}: at most {gpu.max_clock_mhz:g} MHz, others {fastest:g}" for gpu in facts.gpus
                  if gpu.max_clock_mhz is not None and gpu.max_clock_mhz < fastest]  # fmt: skip
        if wrong:
            yield Verdict("clocks", name, "warn", "; ".join(wrong), "cooling and power of the node (`nvidia-smi -q -d "
                          "PERFORMANCE,TEMPERATURE`); one slow GPU slows all")  # fmt: skip
        elif facts.gpus:
            yield Verdict("clocks", name, "ok", f"up to {fastest:g} MHz, none slowed")


def judge_ecc(case: Case) -> Iterator[Verdict]:
    for name, facts in case.looked_at:
        errors = [f"GPU {gpu.index}: {gpu.uncorrected}" for gpu in facts.gpus if gpu.uncorrected]
        off = [str(gpu.index) for gpu in facts.gpus if gpu.ecc == "Disabled"]
        if errors:
            yield Verdict("ECC", name, "fail", f"uncorrected memory errors: {', '.join(errors)}", "`nvidia-smi -q -d "
                          "ROW_REMAPPER,ECC`; reset or replace the GPU before it trains")  # fmt: skip
        elif off:
            yield Verdict(
                "ECC", name, "warn", f"off on GPU {', '.join(off)}", "`nvidia-smi -e 1` and a reset of the GPU"
            )
        elif facts.gpus:
            yield Verdict("ECC", name, "ok", "no uncorrected errors")


def judge_shm(case: Case) -> Iterator[Verdict]:
    for name, facts in case.looked_at:
        least = SHM_WITH_GPUS if facts.gpus else SHM_WITHOUT
        remedy = "remove what is in /dev/shm, or give the container --ipc=host or --shm-size=8g"
        if facts.shm is None:
            yield Verdict(
                "/dev/shm", name, "fail", "there is none", "mount a tmpfs there; see --ipc=host of containers"
            )
        elif facts.shm.free < least:
            yield Verdict("/dev/shm", name, "fail", f"{_free(facts.shm)}, {bytes_text(least)} needed", remedy)
        else:
            yield Verdict("/dev/shm", name, "ok", _free(facts.shm))


def judge_disk(case: Case) -> Iterator[Verdict]:
    for name, facts in case.looked_at:
        if facts.disk is None:
            yield Verdict("disk", name, "fail", "the folder of runs does not exist", "mount it, or correct run.output")
            continue
        needs, free = case.needs, facts.disk.free
        if needs is None:
            yield Verdict("disk", name, "ok", _free(facts.disk))
        elif free < needs.save_bytes:
            yield Verdict("disk", name, "fail", f"{_free(facts.disk)}; one save needs {bytes_text(needs.save_bytes)}",
                          f"make room in {facts.disk.path}, or set run.output to another folder")  # fmt: skip
        elif free < needs.save_bytes * (needs.kept + 1):  # the newest is complete before the oldest goes
            wanted = bytes_text(needs.save_bytes * (needs.kept + 1))
            yield Verdict("disk", name, "warn", f"{_free(facts.disk)}; {needs.kept} saves kept and one written need {wanted}",
                          "make room, or lower run.keep_last")  # fmt: skip
        else:
            yield Verdict("disk", name, "ok", f"{_free(facts.disk)}; a save takes {bytes_text(needs.save_bytes)}")


def judge_memory(case: Case) -> Iterator[Verdict]:
    ranks = sum(_ranks(case, name, facts) for name, facts in case.looked_at)
    for name, facts in case.looked_at:
        free = bytes_text(facts.memory_free)
        if case.needs is None:
            yield Verdict("memory", name, "ok", f"{free} free")
            continue
        own = _ranks(case, name, facts)
        wanted = own * case.needs.loader_bytes + case.needs.state_bytes * own // ranks
        told = f"{free} free; loaders and a save in the background take up to {bytes_text(wanted)}"
        if facts.memory_free < wanted:
            yield Verdict(
                "memory", name, "fail", told, "lower data.workers or data.prefetch, or raise the container's limit"
            )
        else:
            yield Verdict("memory", name, "ok", told)


def judge_limits(case: Case) -> Iterator[Verdict]:
    for name, facts in case.looked_at:
        if 0 <= facts.open_files < OPEN_FILES:
            yield Verdict("open files", name, "warn", f"at most {facts.open_files}", "`ulimit -n 65536` before the start, or "
                          "--ulimit nofile=65536 for a container")  # fmt: skip
        else:
            yield Verdict(
                "open files", name, "ok", f"at most {'any number' if facts.open_files < 0 else facts.open_files}"
            )
        if not facts.infiniband:
            yield Verdict("locked memory", name, "skip", "no InfiniBand here")
        elif facts.memlock >= 0:
            yield Verdict("locked memory", name, "fail", f"at most {bytes_text(facts.memlock)}: InfiniBand cannot register its "
                          "buffers", "`ulimit -l unlimited`, or --ulimit memlock=-1 for a container")  # fmt: skip
        else:
            yield Verdict("locked memory", name, "ok", "unlimited")


def judge_infiniband(case: Case) -> Iterator[Verdict]:
    counts = usual(len(facts.infiniband) for _, facts in case.looked_at)
    for name, facts in case.looked_at:
        down = [f"{port} is {state}" for port, state in facts.infiniband if "ACTIVE" not in state]
        if len(facts.infiniband) != counts:
            yield Verdict("InfiniBand", name, "warn", f"{len(facts.infiniband)} ports, most nodes have {counts}",
                          "`ibstat` there; in a container give --device /dev/infiniband")  # fmt: skip
        elif down:
            yield Verdict(
                "InfiniBand", name, "warn", "; ".join(down), "cable or switch; or name the others in NCCL_IB_HCA"
            )
        elif facts.infiniband:
            yield Verdict("InfiniBand", name, "ok", f"{len(facts.infiniband)} ports active")


def judge_reads(case: Case) -> Iterator[Verdict]:
    paths = {read.path: None for _, facts in case.looked_at for read in facts.reads}
    for path in paths:
        found = {name: read for name, facts in case.looked_at for read in facts.reads if read.path == path}
        same = usual(read.found for read in found.values() if not read.error) if any(
            not read.error for read in found.values()) else ""  # fmt: skip
        for name, read in found.items():
            if read.error:
                yield Verdict("data, weights", name, "fail", read.error, "mount the same folders on every node; the message says "
                              "what else to do")  # fmt: skip
            elif read.found != same:
                yield Verdict("data, weights", name, "fail", f"{path}: {read.found}; most nodes have {same}", "one copy on a "
                              "shared file system, or copy it again")  # fmt: skip
            else:
                yield Verdict("data, weights", name, "ok", f"{path}: {read.found}")
    if not paths:
        for name, _ in case.looked_at:
            yield Verdict("data, weights", name, "skip", "no CONFIG given")


def _judge_gemm(node: str, gemm: Gemm, cublas: str, usual_speed: float) -> Verdict:
    check = "bf16 products"
    if gemm.error:
        version = f" (cuBLAS {cublas})" if cublas else ""
        remedy = "try another version of cuBLAS (`pip install -U nvidia-cublas-cu12`) and, if it stays, another GPU"
        remedy = "see what else keeps the processors busy (`top`)" if gemm.device == "cpu" else remedy
        return Verdict(check, node, "fail", f"{gemm.device}: {gemm.error}{version}", remedy)
    assert gemm.tflops is not None
    told = f"{gemm.tflops:.3g} TFLOP/s on {gemm.name}"
    peak = (peak_flops(gemm.name) or 0.0) / 1e12
    if gemm.tflops < LEAST_OF_PEAK * peak:
        return Verdict(check, node, "warn", f"{gemm.device}: {told}, whose peak is {peak:g}", "see whether somebody else uses the "
                       "GPU (`nvidia-smi`), its clocks and its power limit")  # fmt: skip
    if gemm.device != "cpu" and gemm.tflops < LEAST_OF_OTHERS * usual_speed:
        return Verdict(check, node, "warn", f"{gemm.device}: {told}, others reach {usual_speed:.3g}", "one slow GPU slows all: "
                       "`nvidia-smi` there, its clocks and its power limit")  # fmt: skip
    return Verdict(check, node, "ok", told if gemm.device != "cpu" else "right on the CPU")


def _old_cublas(facts: NodeFacts) -> str:
    """The remedy where H20 meets a cuBLAS that crashes there."""
    if not any(gpu.name.split()[-1] == "H20" for gpu in facts.gpus) or not facts.cublas:
        return ""
    version = tuple(int(part) for part in facts.cublas.split(".") if part.isdigit())
    needed = ".".join(map(str, H20_CUBLAS))
    remedy = f"bf16 products crash there before {needed}: `pip install nvidia-cublas-cu12=={needed}` or newer"
    return remedy if version < H20_CUBLAS else ""


def _gpu_kind(facts: NodeFacts) -> str:
    if not facts.gpus:
        return ""
    names = sorted({gpu.name for gpu in facts.gpus})
    return f"{len(facts.gpus)} x {' and '.join(names)}"


def _free(space: Space) -> str:
    return f"{bytes_text(space.free)} of {bytes_text(space.total)} free"


def _ranks(case: Case, name: str, facts: NodeFacts) -> int:
    return case.slots.get(name) or max(1, len(facts.gpus))
