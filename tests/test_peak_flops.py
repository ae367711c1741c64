import pytest
import torch

from lightning_dsmoe.peak_flops import _PEAKS, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA H100", None),  # PCIe or SXM
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("AMD Instinct MI300X", None),
        ("CPU", None),
        ("Tesla T4", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_bfloat16_by_the_name_that_a_card_gives_itself(name: str, peak: float | None) -> None:
    assert peak_flops(name, torch.bfloat16) == (None if peak is None else peak * 1e12)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("Tesla T4", 65), ("Tesla V100-SXM2-32GB", 125), ("Tesla V100-PCIE-16GB", 112)],
)
def test_cards_without_bfloat16_have_float16(name: str, peak: float) -> None:
    assert peak_flops(name, torch.float16) == peak * 1e12


def test_float32_is_tf32_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops("NVIDIA H200", torch.float32) == 66.9e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops("NVIDIA H200", torch.float32) == 494.7e12
    assert peak_flops("Tesla T4", torch.float32) == 8.1e12
    assert peak_flops("NVIDIA H200", torch.float64) is None


def test_half_the_bits_are_at_least_twice_as_fast_as_tf32() -> None:
    """A peak with sparsity beside one without would be four times as high."""
    for name, peaks in _PEAKS.items():
        if "half" in peaks:
            assert 1.9 < peaks["half"] / peaks["tf32"] < 2.1, name
            assert peaks["float32"] <= peaks["tf32"], name
