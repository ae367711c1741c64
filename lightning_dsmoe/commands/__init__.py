"""What the tools of the command line do."""

from lightning_dsmoe.commands.calibrate import calibrate as calibrate
from lightning_dsmoe.commands.certify import certify as certify
from lightning_dsmoe.commands.configs import configs as configs
from lightning_dsmoe.commands.evaluate import evaluate as evaluate
from lightning_dsmoe.commands.generate import generate as generate
from lightning_dsmoe.commands.prune import prune as prune
from lightning_dsmoe.commands.report import report as report
from lightning_dsmoe.commands.sweep import sweep as sweep
