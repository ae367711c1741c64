import math

import torch
from torch import Tensor

from lightning_dsmoe.attention.rotary import rotate, rotation


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    return rotate(x, rotation(positions, x.shape[-1], 100.0))


def test_turns_each_pair_as_a_complex_number() -> None:
    x, positions = torch.randn(5, 6), torch.tensor([0, 1, 2, 7, 100])
    pairs = torch.complex(x[:, :3], x[:, 3:])
    angles = positions[:, None] * torch.tensor([1.0, 100 ** (-1 / 3), 100 ** (-2 / 3)])
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(
        rotated(x, positions), torch.cat([turned.real, turned.imag], -1), atol=1e-5, rtol=1e-5
    )


def test_position_zero_changes_nothing() -> None:
    x = torch.randn(3, 8)
    assert torch.equal(rotated(x, torch.zeros(3, dtype=torch.long)), x)


def test_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(8), torch.randn(8)
    near = rotated(q, torch.tensor(9)) @ rotated(k, torch.tensor(4))
    far = rotated(q, torch.tensor(59)) @ rotated(k, torch.tensor(54))
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)
    assert abs(near - rotated(q, torch.tensor(9)) @ rotated(k, torch.tensor(5))) > 1e-3


def test_half_precision_is_turned_in_float32() -> None:
    x, positions = torch.randn(4, 8).bfloat16(), torch.tensor([0, 3, 1000, 100_000])
    turned = rotated(x, positions)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotated(x.float(), positions).bfloat16())
    lengths = turned.float().norm(dim=-1) / x.float().norm(dim=-1)
    assert all(math.isclose(length, 1, rel_tol=1e-2) for length in lengths.tolist())
