"""The benchmark of serving: its rows and its file, on the shipped model."""

import json
import pathlib

import pytest
from benchmark_scripts import load_script

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_rows_and_file(tmp_path, capsys, monkeypatch):
    script = load_script("serving_speed")
    output = tmp_path / "serving.json"
    words = (
        f"--model {ROOT}/models/seal-tiny --lengths 24 --batch 3 --adapters 2 --tokens 9 --rounds 1 --output {output}"
    )
    rows = script.main(words.split())
    content = json.loads(output.read_text())
    assert content["rows"] == rows and content["settings"]["model"] == "seal-tiny" and "torch" in content["environment"]
    assert [(row["tokens"], row["batch"], row["cache"]) for row in rows] == [(24, 3, "dynamic"), (24, 3, "static")]
    for row in rows:
        assert set(row["milliseconds a token"]) == {"untouched", "one", "mixed"}
        assert min(row["milliseconds a token"].values()) > 0 and row["mixed / one, time"] > 0
    monkeypatch.setattr(script, "seconds_of", lambda model, ids, cache, new, options: 1.0)  # noise alone
    with pytest.raises(SystemExit, match="9 tokens took no longer than one, 5 times"):
        script.seconds_a_token(None, None, "dynamic", 9, {})
    assert script.ratio({"a": [2.0, 3.0, 9.0], "b": [1.0, 1.0, 1.0]}, "a", "b") == 3.0
