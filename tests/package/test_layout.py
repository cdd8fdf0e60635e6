"""The house: a folder a floor, imports go down only, and names that hide nothing."""

import ast
import importlib
import pathlib
import pkgutil

import pytest

import seal_ops

ROOT = pathlib.Path(seal_ops.__file__).parent
# From the top down. A file imports from its own folder and from the floors below.
FLOORS = [
    {"cli"}, {"experiments"}, {"report", "bench"}, {"training", "evaluation"}, {"quantized"}, {"tasks", "adapters"},
    {"huggingface"}, {"ops"}, {"utils", "version"},
]  # fmt: skip
FLOOR = {name: len(FLOORS) - number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT)


def imported(path: pathlib.Path):
    """The folders of seal_ops that a file imports from, wherever in the file."""
    parts = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["seal_ops", *parts[: len(parts) - node.level + 1]] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            words = name.split(".")
            if words[0] == "seal_ops":
                yield words[1] if len(words) > 1 else "seal_ops"


def violations(path):
    own = path.relative_to(ROOT).parts[0]
    return [f for f in imported(path) if f != own and FLOOR.get(f, FLOOR["cli"]) >= FLOOR[own] and f != "_C"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    assert not violations(path)


def test_an_import_that_goes_up_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "ops").mkdir()
    for line in ("from ..cli import main", "import seal_ops", "from seal_ops import attach", "import seal_ops.tasks"):
        (tmp_path / "ops" / "x.py").write_text(f"def f():\n    {line}\n")
        assert violations(tmp_path / "ops" / "x.py"), line
    (tmp_path / "ops" / "x.py").write_text("from ..utils.files import replacing\nfrom . import masks\n")
    assert not violations(tmp_path / "ops" / "x.py")


def test_only_four_files_at_the_top():
    assert {p.name for p in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "version.py"} and (
        ROOT / "py.typed"
    ).exists()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_stays_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


def test_every_public_name_is_there():
    for name in seal_ops.__all__:
        assert getattr(seal_ops, name) is not None and name in dir(seal_ops)


def test_no_public_function_has_the_name_of_its_module():
    for info in pkgutil.walk_packages([str(ROOT)], "seal_ops."):
        if info.name.endswith(("__main__", "_C", "cli.main")) or ".lm_eval.longeval" in info.name:
            continue  # `main` is what every entry point is called
        module = importlib.import_module(info.name)
        last = info.name.rpartition(".")[2]
        hidden = getattr(module, last, None)
        assert not callable(hidden) or getattr(hidden, "__module__", "") != info.name, f"{info.name}.{last}"
        package, _, name = info.name.rpartition(".")
        assert getattr(importlib.import_module(package), name) is module, f"{info.name} is hidden by another {name}"
