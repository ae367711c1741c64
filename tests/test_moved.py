"""Names that a user of version 0.1 may have typed."""

import sys
from importlib import import_module

import pytest

from lightning_dsmoe.moved import MOVED


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_module_name_leads_to_the_same_objects(
    old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"lightning_dsmoe.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=f"lightning_dsmoe.{new}"):
        found = import_module(f"lightning_dsmoe.{old}")
    expected = import_module(f"lightning_dsmoe.{new}")
    own = [name for name, value in vars(expected).items() if not name.startswith("__")]
    assert own
    assert all(getattr(found, name) is getattr(expected, name) for name in own)
