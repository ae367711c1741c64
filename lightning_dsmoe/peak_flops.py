"""Floating-point operations a second that graphics cards can do at most, without sparsity."""

import re

import torch

_PEAKS: dict[str, dict[str, float]] = {
    "B200": {"half": 2250e12, "tf32": 1125e12, "float32": 75e12},
    "GH200": {"half": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12},
    "H200": {"half": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12},
    "H200 NVL": {"half": 835.5e12, "tf32": 417.5e12, "float32": 60e12},
    "H100 80GB HBM3": {"half": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12},
    "H100 NVL": {"half": 835.5e12, "tf32": 417.5e12, "float32": 60e12},
    "H100 PCIe": {"half": 756e12, "tf32": 378e12, "float32": 51.2e12},
    "H20": {"half": 148e12, "tf32": 74e12, "float32": 44e12},
    "A100": {"half": 312e12, "tf32": 156e12, "float32": 19.5e12},
    "A800": {"half": 312e12, "tf32": 156e12, "float32": 19.5e12},
    "A30": {"half": 165e12, "tf32": 82e12, "float32": 10.3e12},
    "A40": {"half": 149.7e12, "tf32": 74.8e12, "float32": 37.4e12},
    "A10": {"half": 125e12, "tf32": 62.5e12, "float32": 31.2e12},
    "A10G": {"half": 70e12, "tf32": 35e12, "float32": 35e12},
    "RTX A6000": {"half": 154.8e12, "tf32": 77.4e12, "float32": 38.7e12},
    "GeForce RTX 3090": {"half": 71.2e12, "tf32": 35.6e12, "float32": 35.6e12},
    "L4": {"half": 121e12, "tf32": 60e12, "float32": 30.3e12},
    "L40": {"half": 181e12, "tf32": 90.5e12, "float32": 90.5e12},
    "L40S": {"half": 362e12, "tf32": 183e12, "float32": 91.6e12},
    "RTX 6000 Ada Generation": {"half": 364.2e12, "tf32": 182.1e12, "float32": 91.1e12},
    "GeForce RTX 4090": {"half": 165.2e12, "tf32": 82.6e12, "float32": 82.6e12},
    "GeForce RTX 5090": {"half": 209.5e12, "tf32": 104.8e12, "float32": 104.8e12},
    "V100-SXM2": {"float16": 125e12, "float32": 15.7e12},
    "V100-SXM3": {"float16": 125e12, "float32": 15.7e12},
    "V100-PCIE": {"float16": 112e12, "float32": 14e12},
    "V100S-PCIE": {"float16": 130e12, "float32": 16.4e12},
    "T4": {"float16": 65e12, "float32": 8.1e12},
}
"""By the name of the card without its maker: NVIDIA's data sheets of each card and, for GeForce,
appendix A of the white papers on Ampere, Ada and Blackwell. "half" is bfloat16 and float16 with
sums in float32. Data sheets since 2020 show twice as much, with half of the weights zero: "1,979
teraFLOPS" of an H200 are 989 here. Lightning 2.6.6 has 2e15 for it."""
_SIZE = r"([- ](SXM\d|PCIe?|PCIE|\d+GB|HBM\de?))*"
"""What may follow: the memory and the board, where no other entry tells them apart."""


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Operations a second of a card's matrix products at most, without sparsity.

    float32 is TF32 where `torch.set_float32_matmul_precision` allows it and the card has it.

    Args:
        device_name: as `torch.cuda.get_device_name` says it.
        dtype: type of the factors.

    Returns:
        The peak, or None if it is not known, as for a part of a card (MIG).

    Examples:
        >>> import torch
        >>> peak_flops("NVIDIA H200", torch.bfloat16) / 1e12
        989.4
        >>> peak_flops("Tesla T4", torch.bfloat16) is None  # it has none
        True
    """
    name = re.sub(r"^(NVIDIA|Tesla) ", "", device_name)
    fitting = [key for key in _PEAKS if re.fullmatch(re.escape(key) + _SIZE, name)]
    peaks = _PEAKS[max(fitting, key=len)] if fitting else {}
    if dtype == torch.bfloat16:
        return peaks.get("half")
    if dtype == torch.float16:
        return peaks.get("float16", peaks.get("half"))
    if dtype == torch.float32:
        tf32 = torch.get_float32_matmul_precision() != "highest"
        return peaks.get("tf32" if tf32 and "tf32" in peaks else "float32")
    return None
