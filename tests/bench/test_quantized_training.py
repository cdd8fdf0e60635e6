"""benchmarks/quantized_training.py on a tiny shape: every cell that the page names runs from end to end."""

import json
import sys

import pytest
from benchmark_scripts import load_script


@pytest.fixture
def script():
    return load_script("quantized_training")


def test_every_cell(script, tmp_path, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    output = tmp_path / "cells.json"
    arguments = ["quantized_training.py", "--shape", "tiny", "--steps", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    cells = json.loads(output.read_text())["cells"]
    recomputed, kept = script.SIZES["tiny"]
    assert {f"calibration: {part}" for part in ("choose", "residual", "least_squares")} < set(cells)
    assert {f"pieces: {name}" for name in ("q, o", "k, v", "gate, up", "down")} < set(cells)
    for size in (recomputed, kept):
        ran = [method for method in script.METHODS if size is recomputed or not script.planned(method)]
        found = {method: cells[script.cell(method, size)] for method in ran}
        assert all("failed" not in cell and cell["seconds"] > 0 for cell in found.values()), found
        trained = {method: cell["trained"] for method, cell in found.items()}
        assert trained["weak columns"] == trained["weak columns in bf16"] == 2 * trained["weak columns, 8 a layer"]
        assert trained["weak columns + SEAL-C"] == trained["weak columns"] + trained["SEAL-C"]
        assert trained["QLoRA, autocast"] == trained["QLoRA, bf16 adapters"] == trained["QLoRA, the library's loss"]
        assert {method for method, cell in found.items() if "plan" in cell} == set(filter(script.planned, ran))
        losses = [cell["loss"] for cell in found.values()]
        assert max(losses) - min(losses) < 0.2, "one model, one batch, untrained or nearly so"
    printed = capsys.readouterr().out
    assert "least_squares" in printed and "activations kept" in printed
    before = output.read_text()
    script.main()
    assert json.loads(output.read_text())["cells"] == json.loads(before)["cells"], "a second run has nothing left"


def test_chosen_rows(script, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    output = tmp_path / "cells.json"
    chosen = ["--only", "training", "--sizes", "2x64", "--methods", "weak columns, in tiles"]
    arguments = ["quantized_training.py", "--shape", "tiny", "--steps", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*arguments, *chosen])
    script.main()
    (cell,) = json.loads(output.read_text())["cells"].values()
    assert cell["plan"]["layers"] == {"input": 2} and cell["plan"]["tile"] == script.TILE
    monkeypatch.setattr(sys, "argv", [*arguments, *chosen[:-1], "weak columns, planned"])
    with pytest.raises(SystemExit, match="needs the peak of QLoRA, autocast, got none at 2x64"):
        script.main()
