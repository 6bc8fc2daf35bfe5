import math

import torch

from fw_train.monitoring.step_report import OwnStep, describe_bad_step, share


def everywhere(reports):
    """What `share` gives to each rank, with a sum over ranks that sees all their vectors."""
    vectors = []
    for rank, own in enumerate(reports):
        share(own, rank, len(reports), lambda vector: vectors.append(vector) or vector)
    return [share(own, rank, len(reports), lambda _: torch.stack(vectors).sum(0)) for rank, own in enumerate(reports)]


def own(total, stop=False, save=False, unread=0, compute_s=1.0, wait_s=0.1, **more):
    losses = {"loss/total": torch.tensor(total), **{f"loss/{k}": torch.tensor(v) for k, v in more.items()}}
    return OwnStep(losses, 2, stop, save, unread, compute_s, wait_s)


def test_losses_are_means_over_all_micro_batches_and_everyone_gets_the_same():
    all_ranks = everywhere([own(2.0, depth=1.0), own(6.0, depth=5.0, unread=2, compute_s=3.0, wait_s=0.5)])
    assert all_ranks[0] == all_ranks[1]
    assert all_ranks[0].losses == {"loss/depth": 1.5, "loss/total": 2.0}
    assert all_ranks[0].substituted == 2
    assert all_ranks[0].compute_s == [1.0, 3.0]
    assert all_ranks[0].data_wait_s == 0.5
    assert not all_ranks[0].stop
    assert not all_ranks[0].save_due


def test_one_rank_is_enough_to_stop_or_to_save():
    assert all(rank.stop for rank in everywhere([own(1.0), own(1.0, stop=True), own(1.0, stop=True)]))
    assert all(rank.save_due and not rank.stop for rank in everywhere([own(1.0, save=True), own(1.0)]))


def test_a_loss_that_is_not_finite_is_so_for_everyone():
    assert all(math.isnan(rank.losses["loss/total"]) for rank in everywhere([own(1.0), own(float("nan"))]))


def test_a_bad_step_names_every_ranks_samples_and_where_it_began():
    text = describe_bad_step("the loss is nan", own(float("nan"), depth=1.0), ["a", "b"], lambda line: [line, "c"])
    assert text == "step skipped: the loss is nan; samples: rank 0: a, b (loss/total not finite); rank 1: c"
