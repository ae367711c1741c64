import logging
from collections.abc import Iterator

import pytest

LOGGERS = ("lightning.pytorch", "lightning.fabric")


@pytest.fixture(autouse=True)
def logging_stays_as_it_was() -> Iterator[None]:
    """Benchmarks silence Lightning, whose messages other tests read."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
