"""The README's snippets run as printed, and what it points to exists."""

import pathlib
import re
import shutil

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_there_are_three():
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["ops", "train", "evaluate"])
def test_snippet_runs_as_printed(snippet, tmp_path, monkeypatch):
    if "models/seal-tiny" in snippet:
        shutil.copytree(ROOT / "models/seal-tiny", tmp_path / "models/seal-tiny")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    if "out" in names:
        assert names["out"].shape == names["q"].shape and names["s"].grad.abs().sum() > 0
    elif "scales" in names:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {
            p.name for p in (tmp_path / "my-scales").iterdir()
        }
        assert not any("seal" in n.lower() for n, _ in names["model"].named_parameters())
    else:
        assert "300" in str(names["result"]) and "600" in str(names["result"])


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


def test_no_placeholder_is_left():
    assert not re.search(r"DEMO_|SPEED\b|LIMITS\n|CUDA_DIMS", README)
