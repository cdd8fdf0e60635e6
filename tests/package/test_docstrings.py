"""The docstrings of what users call follow the rule of CONTRIBUTING.md."""

import ast
import importlib
import inspect
import re
import textwrap

import pytest

import seal_ops

# Modules that the pages name beside the package itself.
MODULES = (
    "ia3",
    "tasks",
    "statistics",
    "plots",
    "lm_eval",
    "position_programs",
    "huggingface.context_extension.extending",
    "huggingface.context_extension.rolling_cache",
)
SECTIONS = ("Args:", "Attributes:", "Returns:", "Yields:", "Raises:", "Source:")


def own(module, name, found) -> bool:
    return not name.startswith("_") and getattr(found, "__module__", "").startswith("seal_ops")


def names() -> dict:
    """Every public function, class and method: name -> object."""
    found = {}
    for path in ("", *MODULES):
        module = importlib.import_module(f"seal_ops.{path}") if "." in path else getattr(seal_ops, path, seal_ops)
        for name in dir(module):
            value = getattr(module, name)
            if not (inspect.isfunction(value) or inspect.isclass(value)) or not own(module, name, value):
                continue
            if path and value.__module__ != module.__name__:
                continue
            found[".".join(filter(None, ("seal_ops", path, name)))] = value
            for member, method in vars(value).items() if inspect.isclass(value) else ():
                inherited = next((vars(b)[member] for b in value.__mro__[1:] if member in vars(b)), None)
                if not member.startswith("_") and inherited is None and callable(getattr(method, "__func__", method)):
                    found[".".join(filter(None, ("seal_ops", path, name, member)))] = getattr(
                        method, "__func__", method
                    )
                elif isinstance(method, property):
                    found[".".join(filter(None, ("seal_ops", path, name, member)))] = method.fget
    return found


NAMES = names()


def faults(text: str | None, source: str = "") -> list[str]:
    """In what a docstring differs from the rule."""
    if not text:
        return ["there is none"]
    found, (first, *rest) = [], text.splitlines()
    if not first.endswith(".") and "``" not in first[-3:]:
        found.append("its first line is no sentence that ends with a period")
    if rest and rest[0]:
        found.append("its first line is not alone in its paragraph")
    named = set(re.findall(r"\b\w*Error\b", text.partition("Raises:\n")[2]))
    if missing := raised(source) - named:
        found.append(f"Raises: lacks {', '.join(sorted(missing))}")
    if re.search(r"(?m)\bRaises [A-Z`]|^Returns ", text):
        found.append("errors and results belong under Raises: and Returns:")
    if re.search(r"(?m)^``\w+``: |  ``\w+``: ", text):
        found.append("arguments belong under Args:")
    for line in rest:
        if re.fullmatch(r"[A-Z][a-z]+:", line) and line not in SECTIONS:
            found.append(f"{line} is none of {', '.join(SECTIONS)}")
        if re.match(r"\s*(:param|:returns?:|:raises|@param|Parameters$)", line):
            found.append(f"{line.strip()} is of another style")
    return found


def raised(source: str) -> set[str]:
    """The errors that a function raises itself, those of functions inside it included."""
    if not source:
        return set()
    tree = ast.parse(textwrap.dedent(source))
    called = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    return {e.func.id for e in called if isinstance(e, ast.Call) and isinstance(e.func, ast.Name)}


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_follow_the_rule(name):
    found = NAMES[name]
    source = "" if inspect.isclass(found) else inspect.getsource(inspect.unwrap(found))
    assert not faults(vars(found).get("__doc__") if inspect.isclass(found) else inspect.getdoc(found), source)
