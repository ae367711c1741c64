"""What the tools of the command line do."""

from lightning_dsmoe.commands.configs import configs as configs
from lightning_dsmoe.commands.generate import generate as generate
