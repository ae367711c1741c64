"""Names of routed layers, as loggers have them."""

import re
from collections.abc import Iterable


def short_names(layers: Iterable[str]) -> list[str]:
    """Names of layers for loggers: `layer_03` where one number tells them apart.

    Args:
        layers: names of all layers of a kind.

    Examples:
        >>> short_names(["decoder.blocks.0.feed_forward", "decoder.blocks.10.feed_forward"])
        ['layer_00', 'layer_10']
        >>> short_names(["encoder.blocks.0.mlp", "decoder.blocks.0.mlp"])
        ['encoder.blocks.0.mlp', 'decoder.blocks.0.mlp']
    """
    names = list(layers)
    parts = [re.split(r"(?:^|(?<=\.))(\d+)(?=\.|$)", name) for name in names]
    alike = len({tuple(each[::2]) for each in parts}) == 1 and len(parts[0]) == 3
    return [f"layer_{int(each[1]):02d}" for each in parts] if alike else names
