import torch

from fw_train.model.cross_attn import BiCrossAttention
from fw_train.model.rope import extend_unrotated, rope_table

GRID, EXTRA = (2, 2, 3), 5


def module():
    torch.manual_seed(0)
    cross = BiCrossAttention(48, 48, 72, 2)
    video = rope_table(GRID, 36)
    return cross, torch.randn(1, 12, 48), torch.randn(1, 17, 48), video, extend_unrotated(video, EXTRA)


def test_fresh_gates_change_neither_side():
    cross, video, geometry, *tables = module()
    with torch.no_grad():
        new_video, new_geometry = cross(video, geometry, *tables)
    assert torch.equal(new_video, video)
    assert torch.equal(new_geometry, geometry)


def test_both_sides_are_read_before_either_is_written():
    """One affinity matrix, from the inputs alone, softmax over keys for one side and over queries for the other."""
    cross, video, geometry, video_rope, geometry_rope = module()
    torch.nn.init.ones_(cross.gamma_m1)
    torch.nn.init.ones_(cross.gamma_m2)
    a = cross.cross_attn
    norm_v, norm_g = (torch.nn.functional.layer_norm(x, (48,), eps=1e-6) for x in (video, geometry))

    def complex_heads(x, rope):
        heads = x.unflatten(-1, (2, 18, 2)).contiguous()
        return torch.view_as_real(torch.view_as_complex(heads) * torch.view_as_complex(rope)[:, None]).flatten(-2)

    q, k = complex_heads(a.m1_proj(norm_v), video_rope), complex_heads(a.m2_proj(norm_g), geometry_rope)
    affinity = torch.einsum("bvhd,bghd->bhvg", q, k) / 36**0.5
    to_video = torch.einsum("bhvg,bghd->bvhd", affinity.softmax(-1), a.values_m2_proj(norm_g).unflatten(-1, (2, 36)))
    to_geometry = torch.einsum("bhvg,bvhd->bghd", affinity.softmax(-2), a.values_m1_proj(norm_v).unflatten(-1, (2, 36)))
    new_video, new_geometry = cross(video, geometry, video_rope, geometry_rope)
    torch.testing.assert_close(new_video, video + a.out_m1_proj(to_video.flatten(2)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new_geometry, geometry + a.out_m2_proj(to_geometry.flatten(2)), atol=1e-5, rtol=1e-5)
