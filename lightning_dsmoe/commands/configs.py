"""The shipped configurations."""

from importlib.resources import files


def configs(name: str | None = None) -> None:
    """List the shipped configurations, or print one.

    Args:
        name: the one to print, such as quickstart.yaml or callbacks/annealing.yaml; by default
            all are listed with their paths.

    Raises:
        ValueError: if there is no such configuration.
    """
    root = files("lightning_dsmoe.cli_configs")
    folders = [("", root), *((f"{entry.name}/", entry) for entry in root.iterdir())]
    shipped = {
        f"{prefix}{entry.name}": entry
        for prefix, folder in folders
        if folder.is_dir()
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }
    if name is None:
        print("\n".join(f"{key:32} {shipped[key]}" for key in sorted(shipped)))
        return
    if name not in shipped:
        raise ValueError(f"no configuration {name!r}; there are {', '.join(sorted(shipped))}")
    print(shipped[name].read_text(encoding="utf-8"), end="")
