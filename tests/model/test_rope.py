import pytest
import torch

from fw_train.model.rope import axis_widths, extend_unrotated, rope_table, rotate


def test_the_known_axis_widths():
    assert axis_widths(128) == (44, 42, 42)
    assert axis_widths(96) == (32, 32, 32)
    assert axis_widths(24) == (8, 8, 8)


def test_a_head_too_narrow_for_three_axes_is_an_error():
    with pytest.raises(ValueError, match="head width 5"):
        axis_widths(5)


def test_a_table_is_the_rotation_by_position_times_frequency():
    table = rope_table((2, 3, 4), 24)
    frame, row, column = 1, 2, 3
    token = (frame * 3 + row) * 4 + column
    # the second pair of each axis turns by position / 10000 ** (2 / 8)
    for axis, position in enumerate((frame, row, column)):
        angle = torch.tensor(position / 10_000 ** (2 / 8), dtype=torch.float64)
        expected = torch.stack((angle.cos(), angle.sin())).float()
        torch.testing.assert_close(table[token, axis * 4 + 1], expected, atol=1e-7, rtol=0)


def test_rotation_is_complex_multiplication_of_neighbouring_channels():
    x, table = torch.randn(2, 24, 3, 24), rope_table((2, 3, 4), 24)
    expected = torch.view_as_complex(x.unflatten(-1, (-1, 2)).double()) * torch.view_as_complex(table.double())[:, None]
    torch.testing.assert_close(rotate(x, table), torch.view_as_real(expected).flatten(-2).float())


def test_extra_tokens_are_not_rotated():
    table = extend_unrotated(rope_table((1, 2, 2), 24), 5)
    x = torch.randn(1, 9, 2, 24)
    rotated = rotate(x, table)
    assert torch.equal(rotated[:, 4:], x[:, 4:])
    assert not torch.equal(rotated[:, 1:4], x[:, 1:4])
