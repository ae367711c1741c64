"""Parameters of the configurations of arXiv 2404.05567, counted without taking memory for them.

Run it as `python -m benchmarks.quality.sizes`.
"""

from importlib.resources import files
from typing import Any

import jsonargparse
import torch
import yaml

import lightning_dsmoe.schedules  # noqa: F401 - the configurations name it
from lightning_dsmoe import DSMoELanguageModel
from lightning_dsmoe.metrics import count_parameters

TABLE_1 = {"1b": 1067, "3b": 2846, "6b": 6343}
VOCABULARY = 50257


def main() -> None:
    """Print the parameters of the blocks beside the paper's Table 1, in millions."""
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(DSMoELanguageModel, "model")
    for size, paper in TABLE_1.items():
        config = files("lightning_dsmoe.cli_configs").joinpath(f"paper/dsmoe_{size}.yaml")
        model: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]
        model["init_args"]["vocab_size"] = VOCABULARY
        with torch.device("meta"):
            built = parser.instantiate(parser.parse_object({"model": model})).model
        print(f"{size}: {count_parameters(built.decoder).hidden / 1e6:,.1f} M, paper {paper:,} M")


if __name__ == "__main__":
    main()
