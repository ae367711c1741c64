"""Where the runs of a logger lie, by the rule of Lightning's `ModelCheckpoint`."""

from lightning import Trainer
from lightning.pytorch.loggers import Logger


def logger_folder(trainer: Trainer) -> str:
    """Folder of all versions of the first logger; a string, since it may be a remote address.

    Args:
        trainer: has a logger.
    """
    logger = trainer.loggers[0]
    save_dir = trainer.default_root_dir if logger.save_dir is None else logger.save_dir
    return f"{save_dir}/{logger.name}"


def version_name(logger: Logger) -> str:
    """Name of a logger's version as a folder."""
    version = logger.version
    return version if isinstance(version, str) else f"version_{version}"
