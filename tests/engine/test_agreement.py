"""Same configuration, same samples, same losses under both engines; and what training must not touch."""

import pytest
import torch

from fw_train import dist
from fw_train.precision import PRECISIONS, in_island
from processes import run_function
from runs import RATE, Run

STEPS = 3


def both_engines(cases):
    """Trains every case under both engines, one after the other, on the ranks of one world."""
    world = dist.start(120)
    results = []
    for stage, precision, recompute in cases:
        outcome = {}
        for kind in ("deepspeed", "fsdp2"):
            run = Run(world, kind, stage, precision, accumulate=2, recompute=recompute)
            seen = watch_dtypes(run.engine.module)
            losses, norms, positions = run.train(STEPS)
            weights = run.engine.trainable_weights()
            outcome[kind] = {
                "losses": losses,
                "norms": norms,
                "positions": positions,
                "dtypes": seen,
                "untouched": frozen_untouched(run),
                "moved": sum(not torch.equal(weights[name], run.initial[name]) for name in weights),
                "named": sorted(weights) == sorted(run.initial) if world.rank == 0 else weights == {},
                "dtype": sorted({str(weight.dtype) for weight in weights.values()}),
                "weights": weights,
                "optimiser": optimiser_elements(run),
                "trainable": sum(p.numel() for p in run.initial.values()),
            }
        pair = [outcome[kind].pop("weights") for kind in outcome]
        outcome["apart"] = max((largest_difference(pair[0][n], pair[1][n]) for n in pair[0]), default=0.0)
        results.append(outcome)
    return results


def largest_difference(a, b):
    return (a.float() - b.float()).abs().max().item()


def watch_dtypes(model):
    """name of every matrix product -> dtypes of its weight in forward and of its output."""
    seen = {}

    def look(name):
        def hook(module, args, output):
            seen[name] = [str(module.weight.dtype), str(output.dtype)]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d):
            module.register_forward_hook(look(name))
    return seen


def frozen_untouched(run):
    """Frozen parameters have their first values and no gradient, on every rank."""
    wrong = []
    for name, parameter in run.engine.module.named_parameters():
        if name in run.frozen:
            # each engine keeps them its own way
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            if parameter.grad is not None or parameter.requires_grad or not torch.equal(whole, run.frozen[name]):
                wrong.append(name)
    return wrong == [] and len(run.frozen) > 0


def optimiser_elements(run):
    return int(dist.all_sum(torch.tensor(sum(f.numel for f in run.engine.fragments()))))


CASES = [("stage1", "fp32", "none"), ("stage2", "fp32", "none"), ("stage2", "bf16", "full")]


@pytest.fixture(scope="module")
def trained():
    return run_function(both_engines, CASES, size=2, timeout_s=300)


@pytest.fixture(scope="module")
def fp32(trained):
    return [rank[:2] for rank in trained]


@pytest.fixture(scope="module")
def bf16(trained):
    return [rank[2:] for rank in trained]


@pytest.mark.parametrize("case", [0, 1])
def test_fp32_losses_and_norms_agree_to_a_millionth(fp32, case):
    for rank in fp32:
        one, other = rank[case]["deepspeed"], rank[case]["fsdp2"]
        assert len(one["losses"]) == STEPS
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-6)
        # the sign of a vanishing gradient decides a whole step of Adam
        assert other["norms"] == pytest.approx(one["norms"], rel=1e-3)
        assert rank[case]["apart"] < 2 * RATE * STEPS


def test_bf16_losses_agree(bf16):
    """Equal here to the last bit; 1e-3 is what another order of summing may cost in bf16."""
    for rank in bf16:
        one, other = rank[0]["deepspeed"], rank[0]["fsdp2"]
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-3)
        assert other["norms"] == pytest.approx(one["norms"], rel=1e-2)


def test_every_position_is_taken_once_and_the_same_ones_by_both(fp32):
    for kind in ("deepspeed", "fsdp2"):
        steps = zip(*(rank[0][kind]["positions"] for rank in fp32), strict=True)
        for step, ranks in enumerate(steps):
            assert sorted(position for positions in ranks for position in positions) == list(
                range(4 * step, 4 * step + 4)
            )


@pytest.mark.parametrize("kind", ["deepspeed", "fsdp2"])
def test_frozen_parameters_cost_nothing_and_never_change(fp32, bf16, kind):
    for rank in (*fp32, *bf16):
        for case in rank:
            assert case[kind]["untouched"]
            assert case[kind]["optimiser"] == case[kind]["trainable"]


@pytest.mark.parametrize("kind", ["deepspeed", "fsdp2"])
def test_trainable_weights_are_whole_on_rank_0_in_the_models_dtype(fp32, bf16, kind):
    for ranks, dtype in ((fp32, "torch.float32"), (bf16, "torch.bfloat16")):
        for case in range(len(ranks[0])):
            assert all(rank[case][kind]["named"] for rank in ranks)
            assert ranks[0][case][kind]["dtype"] == [dtype]
            assert ranks[0][case][kind]["moved"] > 100


@pytest.mark.parametrize("kind", ["deepspeed", "fsdp2"])
def test_forward_sees_the_dtypes_of_the_table(bf16, kind):
    table = PRECISIONS["bf16"]
    for rank in bf16:
        seen = rank[0][kind]["dtypes"]
        assert len(seen) > 100
        for name, (weight, output) in seen.items():
            assert weight == str(table.params), name
            if not name.startswith(("head_depth", "head_point")):  # dense heads keep their activations in fp32
                assert output == str(torch.float32 if in_island(name) else table.compute), name
    assert bf16[0][0]["deepspeed"]["dtypes"] == bf16[0][0]["fsdp2"]["dtypes"]
