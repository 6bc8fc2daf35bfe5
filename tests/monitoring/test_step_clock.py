import time

import pytest
import torch

from fw_train.monitoring.step_clock import StepClock


def test_parts_add_up_and_waiting_for_data_is_apart():
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        time.sleep(0.02)
        clock.mark("data")
        time.sleep(0.05)
        clock.mark("forward")
    parts = clock.parts_s()
    assert set(parts) == {"data", "forward"}
    assert parts["data"] >= 0.04
    assert parts["forward"] >= 0.1
    assert sum(parts.values()) <= clock.total_s()


@pytest.mark.gpu
def test_the_device_is_timed_and_not_the_launches():
    clock = StepClock(torch.device("cuda"))
    clock.mark("data")
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        x = x @ x / 64
    clock.mark("forward")
    assert clock.parts_s()["forward"] > 1e-3
