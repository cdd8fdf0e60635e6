"""The paper's recipe from end to end, tiny."""

import json

from benchmark_scripts import load_script


def test_the_recipe_runs_tiny(tmp_path, capsys):
    script = load_script("paper_recipe")
    output = tmp_path / "recipe.json"
    found = script.main(f"--sizes tiny --samples 3 --length 200 --output {output}".split())
    assert found["steps"] == 3 and found["plan"]["expected_peak"] > 0
    assert 0 < found["seconds of training"] <= found["seconds"]
    assert json.loads(output.read_text())["environment"]["torch"]
