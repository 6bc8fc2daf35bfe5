import gc
import multiprocessing

import pytest
import torch
from packed_clips import make_packed

from fw_train.data.arena import NO_SLOT, Arena, Carried, Placed, SlotWriter, restore
from fw_train.data.loader import LoaderParams, SourceParams, TrainingData

TENSORS = [
    torch.arange(300, dtype=torch.int32).reshape(3, 100),
    torch.randn(5, 7).bfloat16(),
    torch.tensor([True, False]),
    torch.arange(12).to(torch.uint16).reshape(3, 4)[:, 1:3],
    torch.zeros(0, 3),
    torch.tensor(2.5, dtype=torch.float64),
]


def test_tensors_come_back_from_a_slot_and_from_messages():
    arena = Arena(2, 1 << 16)
    for writer, slot, kinds in (
        (arena.writer(1), arena.lease(1), {Placed, Carried}),
        (arena.writer(NO_SLOT), None, {Carried}),
    ):
        places = [writer.place(tensor) for tensor in TENSORS]
        assert {type(place) for place in places} == kinds
        for tensor, place in zip(TENSORS, places, strict=True):
            back = restore(place, slot)
            assert back.dtype == tensor.dtype
            assert torch.equal(back.double(), tensor.double())


def test_arrays_made_in_a_slot_are_not_copied():
    arena = Arena(1, 1 << 16)
    writer = arena.writer(0)
    array = writer.empty((4, 5), "f4")
    array[:] = 7
    used = writer.used
    place = writer.place(torch.from_numpy(array))
    assert writer.used == used
    assert (restore(place, arena.lease(0)) == 7).all()
    before = torch.from_numpy(array)
    array[0, 0] = 9
    assert restore(place, torch.from_numpy(arena._slot(0)))[0, 0] == 9
    assert before[0, 0] == 9


def test_what_a_slot_cannot_hold_travels_with_the_message():
    arena = Arena(1, 4096)
    writer = arena.writer(0)
    assert writer.empty((5000,), "u1").base is None
    assert isinstance(writer.place(torch.zeros(5000)), Carried)
    assert isinstance(writer.place(torch.zeros(100)), Placed)


def test_a_slot_is_free_again_when_its_last_tensor_is_gone():
    arena = Arena(2, 4096)
    first, second = arena.take(), arena.take()
    assert {first, second} == {0, 1}
    assert arena.take() == NO_SLOT
    lease = arena.lease(first)
    part = lease[100:200].view(torch.float32)
    del lease
    gc.collect()
    assert arena.take() == NO_SLOT
    del part
    assert arena.take() == first


def _write(arena):
    arena.writer(1).empty((10,), "u1")[:] = 5


def test_processes_write_what_the_trainer_reads():
    arena = Arena(2, 4096)
    process = multiprocessing.get_context("forkserver").Process(target=_write, args=(arena,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert arena.lease(1)[:11].tolist() == [5] * 10 + [0]
    assert not arena.lease(0).any()


@pytest.mark.parametrize("kept", [1, 2, 20])
def test_batches_that_are_kept_keep_their_numbers(tmp_path, kept):
    out = make_packed(tmp_path, ((3, 32, 48, 5),), kinds=("latent", "text"))
    params = LoaderParams(
        5, ((32, 48),), "sidecar", ("latent", "text"), video=True, text_tokens=4, workers=1, prefetch=1
    )
    held, checked = [], 0
    dataset = TrainingData([SourceParams(str(out))], params, 0)
    alone = TrainingData([SourceParams(str(out))], LoaderParams(**{**vars(params), "workers": 0}), 0)

    def numbers(batch):
        (sample,) = batch.samples
        return [
            sample.key,
            sample.labels.depth.deltas,
            sample.labels.points.deltas,
            sample.video.y,
            *sample.encoded.values(),
        ]

    layout = {"rank": 0, "world": 1, "micro_batch": 1}
    for batch, wanted in zip(
        dataset.batches([(0, 1)], 0, 12, **layout), alone.batches([(0, 1)], 0, 12, **layout), strict=True
    ):
        held.append((batch, wanted))
        del held[:-kept]
        for mine, theirs in held:
            for a, b in zip(numbers(mine), numbers(theirs), strict=True):
                assert a == b if isinstance(a, str) else torch.equal(a, b)
                checked += 1
    assert checked >= 12 * 6


def test_a_writer_without_a_slot_is_plain_memory():
    writer = SlotWriter(torch.empty(0, dtype=torch.uint8).numpy())
    assert writer.empty((3,), "f4").shape == (3,)
    assert writer.used == 0
