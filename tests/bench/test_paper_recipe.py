"""The paper's recipe from end to end, tiny."""

import importlib.util
import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_recipe_runs_tiny(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("paper_recipe", ROOT / "benchmarks/paper_recipe.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    output = tmp_path / "recipe.json"
    found = script.main(f"--sizes tiny --samples 3 --length 200 --output {output}".split())
    assert found["steps"] == 3 and found["plan"]["expected_peak"] > 0
    assert 0 < found["seconds of training"] <= found["seconds"]
    assert json.loads(output.read_text())["environment"]["torch"]
