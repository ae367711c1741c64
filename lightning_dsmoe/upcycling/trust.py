"""What a configuration of transformers may not ask for before it is trusted."""

from pathlib import Path

from lightning_dsmoe.files import read_json


def check_no_kernels(path: Path) -> None:
    """Raise a ValueError if a config.json names kernels of the Hub, such as for its attention.

    transformers fetch and run those without being told that remote code is trusted.

    Args:
        path: the directory of the model.

    Raises:
        FileNotFoundError: if there is no config.json.
        ValueError: if it names one, or is no JSON.
    """
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {path}")
    if named := _kernels(read_json(path / "config.json"), is_choice=False):
        raise ValueError(
            f"{path / 'config.json'} asks for code of the Hub, {named[0]!r:.100}, which is run "
            "only with trust_remote_code"
        )


def _kernels(value: object, *, is_choice: bool) -> list[str]:
    if isinstance(value, dict):
        return [
            kernel
            for name, part in value.items()
            for kernel in _kernels(part, is_choice=is_choice or "_implementation" in name)
        ]
    if isinstance(value, list):
        return [kernel for part in value for kernel in _kernels(part, is_choice=is_choice)]
    return [value] if is_choice and isinstance(value, str) and "/" in value else []
