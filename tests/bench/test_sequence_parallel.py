"""Steps of a sample that several processes share, tiny: one process, then two over the stand-in for DeepSpeed."""

import json

import pytest
from benchmark_scripts import load_script
from launching import two_processes

WORDS = "--model-sizes tiny --layers 2 --length 90 --check-length 30".split()


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_two_processes_beside_one(tmp_path, capsys):
    assert load_script("sequence_parallel").main([*WORDS, "--output", str(tmp_path / "one.json")]) == 0
    assert "90 tokens, 1 processes" in capsys.readouterr().out
    with pytest.raises(AssertionError, match=r"Timeout[\s\S]*in hang"):  # what the program does in the end
        two_processes("divided_steps.py", tmp_path, CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    assert (tmp_path / "done-0").exists() and (tmp_path / "done-1").exists(), "a process ended early"
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2) and one["status"] == two["status"] == "ok"
    assert one["gradient_error"] < 1e-4 and two["gradient_error"] < 1e-4
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert len(two["seconds"]) == 1 and len(two["peak_bytes_each"]) == 2
    assert two["against"]["times_as_fast"] == one["seconds_a_step"] / two["seconds_a_step"]
    assert two["tokens_per_s"] == pytest.approx(90 / two["seconds_a_step"])


def test_a_result_of_other_steps_is_refused(tmp_path):
    script = load_script("sequence_parallel")
    found = {"model": "8b", "layers": 2, "length": 90, "labels": 45, "status": "ok"}
    (tmp_path / "other.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="--against must be of the same model, got 8b for tiny"):
        script.beside(found | {"model": "tiny"}, tmp_path / "other.json")
