"""Which model the training commands build, and how tools name their options."""

from pathlib import Path

import pytest

from lightning_dsmoe.cli import main

pytestmark = pytest.mark.slow


def error_of(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: object) -> str:
    monkeypatch.setattr("sys.argv", ["lightning-dsmoe"])
    with pytest.raises(SystemExit, match="2"):
        main(words)
    printed: str = capsys.readouterr().err  # type: ignore[attr-defined]
    return printed


def test_a_model_without_a_class_path_is_the_librarys_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {init_args: {d_model: 8}}\n")
    for words in (["--model.d_model=8"], ["-c", str(file)]):
        assert "required: n_layers" in error_of(["fit", *words], monkeypatch, capsys)
    words = ["fit", "--model=UpcycledLanguageModel", "--model.n_experts=2"]
    assert "required: directory" in error_of(words, monkeypatch, capsys)


def test_options_are_named_as_they_are_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = error_of(["upcycle", "--n_experts=3"], monkeypatch, capsys)
    assert "required: --from\n" in printed
