"""What `lightning-dsmoe --help` prints, for which nothing that takes seconds is loaded."""

from collections.abc import Mapping
from textwrap import fill

from lightning_dsmoe.commands.tools import SENTENCES

TRAINING = {
    "fit": "Train a model, from the start or from a checkpoint.",
    "validate": "Measure a checkpoint on the validation split.",
    "test": "Measure a checkpoint on the test split.",
    "predict": "Run a model on the batches that a data module has for predictions.",
}
"""The commands of LightningCLI."""

COMMON_OPTIONS = """\
options of every command:
  --import MODULE       Import your own routers, experts or other classes first;
                        may be repeated.
  --debug               Show the traceback of an error."""


def overview() -> str:
    """All commands, each with one sentence."""
    return f"""\
usage: lightning-dsmoe COMMAND ...

Train DS-MoE language models: all experts are trained on every token;
at inference only those that matter run.

training and evaluation, configured by files and options:
{_listed(TRAINING)}

tools for trained models:
{_listed(SENTENCES)}

{COMMON_OPTIONS}
  -h, --help            Show this, or after a command its options.

To begin: lightning-dsmoe fit -c FILE.yaml, with one of your own or of those
that the command configs lists; --print_config prints all that it sets."""


def _listed(words: Mapping[str, str]) -> str:
    indent = " " * 24
    return "\n".join(
        fill(text, 79, initial_indent=f"    {name:20}", subsequent_indent=indent)
        for name, text in words.items()
    )
