import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
LINKED = ("callbacks", "cli_configs")
WITHOUT_LIGHTNING = (
    *("routing", "losses", "experts", "attention", "decoder", "metrics", "serialization"),
    *("inference", "schedules", "tokenizers"),
)


def run_python(code: str, *, cwd: Path, path: tuple[Path | str, ...] = ()) -> str:
    """Run code in a fresh process that sees only `path`, without the editable install."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def shipped_files(folder: Path) -> set[str]:
    """Names relative to `folder` of the files a user of the package needs."""
    return {
        path.relative_to(folder).as_posix()
        for pattern in ("*.py", "*.yaml", "*.css", "*.js", "*.jinja", "py.typed")
        for path in folder.rglob(pattern)
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
        text=True,
    )
    assert len(list(folder.glob("*.tar.gz"))) == 1
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    options = ["--no-index", "--no-deps", "--no-compile"]
    subprocess.run(
        [*pip, *options, "--target", target, wheel], check=True, capture_output=True, text=True
    )
    return target


@pytest.fixture(scope="module")
def without_links(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as git checks them out where it makes no symbolic links: as text files."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name in ("lightning_dsmoe", *LINKED):
        ignored = shutil.ignore_patterns("__pycache__", *(LINKED if name not in LINKED else ()))
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in LINKED:
        (folder / "lightning_dsmoe" / name).write_text(f"../{name}")
    return folder


def test_sources_work_without_links(without_links: Path, tmp_path: Path) -> None:
    code = """
from importlib.resources import files
from importlib.util import find_spec
print(find_spec("lightning_dsmoe.callbacks").origin)
print(files("lightning_dsmoe.cli_configs").joinpath("callbacks/annealing.yaml"))
"""
    path = (without_links, sysconfig.get_path("purelib"))
    found = run_python(code, cwd=tmp_path, path=path).splitlines()
    assert found == [
        str(without_links / "callbacks" / "__init__.py"),
        str(without_links / "cli_configs" / "callbacks" / "annealing.yaml"),
    ]


def test_wheel_is_the_same_without_links(wheel: Path, without_links: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    subprocess.run(build, cwd=without_links, check=True, capture_output=True)
    (built,) = (without_links / "dist").iterdir()
    assert zipfile.ZipFile(built).namelist() == zipfile.ZipFile(wheel).namelist()


def test_wheel_ships_every_source_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "lightning_dsmoe"
    sources = shipped_files(package).union(
        *({f"{name}/{file}" for file in shipped_files(ROOT / name)} for name in LINKED)
    )
    assert {"py.typed", "callbacks/__init__.py", "cli_configs/quickstart.yaml"} <= sources
    in_package = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert in_package == {f"lightning_dsmoe/{file}" for file in sources}


def test_wheel_imports_in_a_fresh_environment(installed: Path, tmp_path: Path) -> None:
    code = """
import sys
from importlib.resources import files
import lightning_dsmoe, lightning_dsmoe.callbacks
import lightning_dsmoe.cli
for name in dir(lightning_dsmoe):
    getattr(lightning_dsmoe, name)
assert files("lightning_dsmoe.cli_configs").joinpath("quickstart.yaml").is_file()
assert "callbacks" not in sys.modules
print(lightning_dsmoe.__file__)
"""
    output = run_python(code, cwd=tmp_path, path=(installed, sysconfig.get_path("purelib")))
    assert Path(output).is_relative_to(installed)


def test_blocks_import_neither_lightning_nor_bitsandbytes(tmp_path: Path) -> None:
    code = f"""
import sys
from importlib import import_module
import lightning_dsmoe
for room in {WITHOUT_LIGHTNING}:
    import_module("lightning_dsmoe." + room)
print(sorted({{"lightning", "pytorch_lightning", "bitsandbytes", "callbacks"}} & set(sys.modules)))
"""
    path = (ROOT, sysconfig.get_path("purelib"))
    assert run_python(code, cwd=tmp_path, path=path) == "[]"


def test_versions_agree() -> None:
    import lightning_dsmoe

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d[^]]*)\] - (\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    assert newest is not None
    assert lightning_dsmoe.__version__ == project["version"]
    assert (citation["version"], citation["date-released"]) == newest.groups()
    assert citation["version"] == project["version"]
