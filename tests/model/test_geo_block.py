"""The geometry block against the Wan block whose weights it carries."""

import pytest
import torch

from fw_train.model.geo_block import GeoBlock, add_per_frame
from fw_train.model.rope import extend_unrotated, rope_table
from fw_train.model.wan import WanBlock
from samples import tiny_wan

GRID, SPECIAL = (3, 4, 4), 5
WAN = tiny_wan("camera")
TOKENS = GRID[0] * GRID[1] * GRID[2]


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def random(*shape, kind=dtype):
        return torch.randn(*shape, generator=generator).to(kind)

    return {
        "x": random(2, TOKENS + SPECIAL, 48),
        "text": random(2, 7, 48),
        "image": random(2, 9, 48),
        "time": random(2, 6, 48, kind=torch.float32),
        "rope": extend_unrotated(rope_table(GRID, WAN.head_dim), SPECIAL),
    }


def pose(dtype=torch.float32, on=1.0):
    return {
        "frame_rope": rope_table(GRID, WAN.head_dim)[: GRID[1] * GRID[2]],
        "pose": torch.randn(2, GRID[0], 48, generator=torch.Generator().manual_seed(2)).to(dtype),
        "pose_on": torch.full((2, 1, 1), on, dtype=dtype),
    }


def pair(dtype=torch.float32):
    wan = WanBlock(WAN).to(dtype)
    geo = GeoBlock(WAN).to(dtype)
    missing, unexpected = geo.load_state_dict(wan.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith(("pose_adapter", "frame_attn")) for name in missing)
    return wan, geo


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_block_equals_its_wan_block_bit_for_bit(dtype):
    wan, geo = pair(dtype)
    with torch.no_grad():
        assert torch.equal(geo(**inputs(dtype), **pose(dtype)), wan(**inputs(dtype)))


def open_gate(geo):
    torch.nn.init.ones_(geo.frame_attn.gate)


def open_adapter(geo):
    torch.nn.init.normal_(geo.pose_adapter[1].weight)
    torch.nn.init.ones_(geo.pose_adapter[1].bias)


def test_frame_attention_stays_within_the_frame():
    _, geo = pair()
    open_gate(geo)
    x = torch.randn(1, TOKENS, 48)
    changed = x.clone()
    changed[:, :16] += 1  # the first frame
    rope = pose()["frame_rope"]
    with torch.no_grad():
        difference = (geo.frame_attn(changed, rope) - geo.frame_attn(x, rope)).abs().amax(dim=(0, 2))
    assert difference[:16].min() > 0
    assert difference[16:].max() == 0


def test_special_tokens_pass_frame_attention_and_pose_unchanged():
    """Seen through the input of the next sub-block, where they have not yet met the video tokens again."""
    _, geo = pair()
    seen = []
    geo.norm3.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        geo(**inputs(), **pose())
        open_gate(geo)
        open_adapter(geo)
        geo(**inputs(), **pose())
    fresh, opened = seen
    assert torch.equal(fresh[:, TOKENS:], opened[:, TOKENS:])
    assert not torch.equal(fresh[:, :TOKENS], opened[:, :TOKENS])


def test_a_closed_pose_leaves_no_trace_whatever_the_adapter_learned():
    wan, geo = pair()
    open_adapter(geo)
    with torch.no_grad():
        assert torch.equal(geo(**inputs(), **pose(on=0.0)), wan(**inputs()))
        assert not torch.equal(geo(**inputs(), **pose(on=1.0)), wan(**inputs()))


def test_a_pose_shifts_the_tokens_of_its_own_frame():
    shift = torch.arange(3.0).view(1, 3, 1).expand(1, 3, 2)
    shifted = add_per_frame(torch.zeros(1, 6, 2), shift)
    assert shifted[0, :, 0].tolist() == [0, 0, 1, 1, 2, 2]
