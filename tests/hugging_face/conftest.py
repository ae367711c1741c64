import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def edit_config(tmp_path: Path) -> Callable[[dict[str, Any]], None]:
    """Changes fields of the config.json in the folder of a test; None removes one."""

    def edit(fields: dict[str, Any]) -> None:
        path = tmp_path / "config.json"
        config = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))

    return edit
