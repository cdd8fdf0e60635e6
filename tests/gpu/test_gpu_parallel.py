"""Two GPUs over NCCL equal one: the programs of `tests/training/test_parallel.py`, a GPU for each process."""

import importlib.util

import pytest
import torch
from launching import two_processes

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two processes want a GPU each")
SECTIONS = ("loop", "command", "data_parallel", "half_precision", "tensor_parallel", "sequence_parallel")


@pytest.mark.parametrize("section", SECTIONS)
def test_two_gpus_equal_one(tmp_path, section):
    two_processes("parallel_processes.py", tmp_path, section)
    assert (tmp_path / f"{section}-0").exists() and (tmp_path / f"{section}-1").exists(), "a process ended early"


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("program", [["sequence_processes.py"], ["ulysses_trainer.py", 0], ["ulysses_trainer.py", 3]])
def test_deepspeed(tmp_path, program):
    two_processes(program[0], tmp_path, *program[1:], DS_ACCELERATOR="cuda")
    assert (tmp_path / "done-0").exists() and (tmp_path / "done-1").exists(), "a process ended early"


def test_a_model_split_over_two_gpus_trains(tmp_path):
    import transformers
    from families import FAMILIES

    import seal_ops

    plain = FAMILIES["llama"].build()
    plain.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.rotary_emb": 0} | dict.fromkeys(
        ("model.layers.1", "model.norm", "lm_head"), 1
    )
    split = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places)
    ids = torch.randint(3, 97, (4, 10), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [{"input_ids": row, "labels": row} for row in ids]
    found = []
    for model in (plain.to("cuda"), split):
        scales = seal_ops.attach(model, "channel")
        found.append((seal_ops.train(model, samples, lr=0.05, progress=False).losses, scales))
    assert [scale.device.index for _, scale in found[1][1].items()] == [0, 1]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=5e-3, atol=1e-4)
    for layer, value in found[0][1].values().items():
        torch.testing.assert_close(found[1][1].values()[layer], value, rtol=5e-3, atol=1e-4)
