"""Which attention kernel runs where; the kernels themselves need a GPU."""

import sys
import types

import pytest
import torch

from fw_train.model import attention


@pytest.fixture(autouse=True)
def _restore():
    yield
    attention.choose_kernel(torch.device("cpu"))


def pretend(monkeypatch, capability, *modules):
    """A GPU of that capability with these flash-attn packages installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    for name in ("flash_attn_interface", "flash_attn"):
        module = (
            types.SimpleNamespace(flash_attn_func=lambda q, k, v, name=name: (q * 2, name)) if name in modules else None
        )
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    ("capability", "modules", "chosen"),
    [
        (9, ("flash_attn_interface", "flash_attn"), "flash_attn_interface"),
        (9, ("flash_attn",), "flash_attn"),
        (9, (), "scaled_dot_product_attention"),
        (8, ("flash_attn_interface", "flash_attn"), "flash_attn"),
        (10, ("flash_attn_interface",), "scaled_dot_product_attention"),  # Hopper's kernels do not run on Blackwell
        (7, ("flash_attn",), "scaled_dot_product_attention"),
    ],
)
def test_the_fastest_kernel_that_runs_on_the_device_is_chosen(monkeypatch, caplog, capability, modules, chosen):
    pretend(monkeypatch, capability, *modules)
    with caplog.at_level("INFO"):
        assert attention.choose_kernel(torch.device("cuda", 0)) == chosen
    assert chosen in caplog.text


def test_a_log_sum_exp_beside_the_output_is_dropped(monkeypatch):
    pretend(monkeypatch, 9, "flash_attn_interface")
    attention.choose_kernel(torch.device("cuda", 0))
    q = torch.randn(1, 2, 3, 4)
    assert torch.equal(attention._half_kernel(q, q, q), q * 2)


def test_attention_by_hand():
    q, k, v = (torch.randn(2, n, 3, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 7, 7))
    scores = torch.einsum("blhd,bshd->bhls", q, k) / 8**0.5
    expected = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v)
    torch.testing.assert_close(attention.attend(q, k, v), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_attends_in_fp32_and_rounds_once(dtype):
    q, k, v = (torch.randn(2, n, 3, 8, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (5, 7, 7))
    assert torch.equal(attention.attend(q, k, v), attention.attend(q.float(), k.float(), v.float()).to(dtype))
