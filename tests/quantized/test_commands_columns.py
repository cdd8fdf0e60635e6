"""`seal quantize`, `seal train --weak-columns`, and the study of a 4-bit model, on a tiny model."""

import copy
import json

import pytest
import safetensors.torch
import torch
from command_line import seal
from families import FAMILIES, close, logits
from retrieval_fixtures import CHAT, tokenizer
from transformers import AutoModelForCausalLM

import seal_ops
from seal_ops.experiments.quantized_study import driver, plan
from seal_ops.quantized import bases
from seal_ops.training.texts import rows_of_file

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with the shipped tokenizer, as a checkpoint."""
    path = tmp_path_factory.mktemp("model")
    FAMILIES["llama"].build(vocab_size=len(tokenizer()), max_position_embeddings=1024).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "english.txt"
    path.write_text("\n".join(f"Line {i} says that the grass is green and the sky is blue." for i in range(600)))
    return path


@pytest.mark.parametrize("method", ["nf4", "nf4-double"])
def test_quantize(capsys, folder, text, tmp_path, method):
    output = tmp_path / "nf4"
    code, out, err = seal(
        capsys, "quantize", "--model", folder, "--device", "cpu", "--weak-columns", 4, "--quantize", method,
        "--calibration", text, "--output", output,
    )  # fmt: skip
    assert code == 0, err
    assert "14 layers in" in out and "4 weak columns each" in out
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert loaded.is_quantized and bases.is_nf4(loaded.model.layers[0].mlp.up_proj)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, len(tokenizer()), (2, 20))
    seal_ops.load_weak_columns(model, output)  # quantised likewise
    seal_ops.load_weak_columns(loaded, output)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    code, _, err = seal(capsys, "quantize", "--model", folder, "--calibration", text, "--output", output)
    assert code == 1 and "output folder must be new or empty" in err


def test_train(capsys, folder, tmp_path):
    arguments = ["train", "--model", folder, "--device", "cpu", "--task", "lines", "--length", 190, "--samples", 2]
    columns = ["--weak-columns", 4, "--quantize", "nf4"]
    code, out, err = seal(
        capsys, *arguments, *columns, "--granularity", "head", "--column-lr", 1e-3, "--output", tmp_path / "both"
    )
    assert code == 0, err
    assert "numbers of weak columns and scales trained in 2 steps" in out
    settings = json.loads((tmp_path / "both" / "training.json").read_text())["settings"]
    assert settings["columns"] == 4 and settings["column_lr"] == 1e-3 and settings["granularity"] == "head"
    model = AutoModelForCausalLM.from_pretrained(folder)
    seal_ops.load_weak_columns(model, tmp_path / "both")
    seal_ops.load(model, tmp_path / "both")
    tuned = ["--weak-columns", tmp_path / "both", "--scales", tmp_path / "both"]
    code, out, err = seal(
        capsys, "eval", "--model", folder, "--device", "cpu", *tuned, "--lengths", 190, "--cases", 1, "--output",
        tmp_path / "eval.json",
    )  # fmt: skip
    assert code == 0 and json.loads((tmp_path / "eval.json").read_text())["name"] == "both", err
    output = tmp_path / "merged"
    code, out, err = seal(capsys, "merge", "--model", folder, "--device", "cpu", *tuned, "--output", output)
    assert code == 0, err
    merged, ids = AutoModelForCausalLM.from_pretrained(output), torch.randint(0, len(tokenizer()), (2, 20))
    assert close(logits(merged, ids), logits(model, ids))
    code, _, err = seal(capsys, "merge", "--model", folder, "--output", tmp_path / "neither")
    assert code == 1 and "--scales or --weak-columns must be given, got neither" in err
    code, out, err = seal(capsys, *arguments, *columns, "--output", tmp_path / "columns")
    assert code == 0 and "numbers of weak columns trained" in out, err
    code, _, err = seal(capsys, *arguments, "--output", tmp_path / "none")
    assert code == 1 and "must say what is trained, got neither" in err
    code, _, err = seal(capsys, *arguments, "--granularity", "head", "--quantize", "nf4", "--output", tmp_path / "none")
    assert code == 1 and "need --weak-columns, got none" in err


def test_train_on_conversations(capsys, folder, tmp_path):
    """Columns alone, columns with scales, and scales: on `messages`; a killed run goes on bit for bit."""
    words = copy.deepcopy(tokenizer())
    words.chat_template = CHAT
    chatty = tmp_path / "chatty"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(chatty)
    words.save_pretrained(chatty)
    chats = tmp_path / "chats.jsonl"
    turns = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}] for n in range(5)]
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    arguments = ["train", "--model", chatty, "--device", "cpu", "--text", chats]
    columns = ["--weak-columns", 4, "--quantize", "nf4", "--column-lr", 1e-3]
    kinds = {"columns": columns, "both": [*columns, "--granularity", "head"], "scales": ["--granularity", "head"]}
    for name, more in kinds.items():
        code, out, err = seal(capsys, *arguments, *more, "--output", tmp_path / name)
        assert code == 0 and "trained in 5 steps" in out, err
    trained = safetensors.torch.load_file(tmp_path / "columns" / "weak_columns.safetensors")
    code, out, err = seal(capsys, *arguments, *columns, "--length", 200, "--output", tmp_path / "packed")
    assert code == 0 and "trained in 1 steps" in out, err
    # Killed after three steps, in a process of its own, so to speak: a fresh model goes on from the checkpoint.
    rows = rows_of_file(chats, words, None, "test")

    def stop(step, _loss):
        if step == 3:
            raise KeyboardInterrupt

    def run(**options):
        model = AutoModelForCausalLM.from_pretrained(chatty, dtype="float32")
        seal_ops.attach_weak_columns(model, 4, calibration=rows, quantize="nf4")
        options = dict(column_lr=1e-3, output_dir=tmp_path / "killed", checkpoint_every=1, progress=False, **options)
        seal_ops.train(model, rows, **options)

    with pytest.raises(KeyboardInterrupt):
        run(on_step=stop)
    run(resume=True)
    resumed = safetensors.torch.load_file(tmp_path / "killed" / "weak_columns.safetensors")
    assert trained.keys() == resumed.keys() and all(torch.equal(trained[n], resumed[n]) for n in trained)
    for more, sentence in [
        (["--data", "x", *columns], "--data or --text must say what is trained on, got both"),
        (["--recipe-option", "group=2", *columns], "--recipe must be given with --recipe-option, got none"),
    ]:
        code, _, err = seal(capsys, *arguments, *more, "--output", tmp_path / "none")
        assert code == 1 and err == f"seal train: {sentence}\n"


def test_study(capsys, folder, text, tmp_path):
    """Every kind of job, resumed in the middle, and the table."""
    pytest.importorskip("peft")
    output = tmp_path / "study"
    settings = [
        "task=lines", "lengths=[190]", "cases=1", "seeds=[0,1]", "samples=1", "train_length=190", "columns=[4]",
        "window=64", "text_windows=4", "held_out_windows=2", "calibration_windows=3", "validation_windows=1",
        "column_factors=[4,20]", "scale_rates=[1e-2]", "low_rank_rates=[1e-3]",
    ]  # fmt: skip
    arguments = [
        "study", "--preset", "smollm2-4bit", "--model", folder, "--device", "cpu", "--text", text, "--output", output,
        "--plan", *settings,
    ]  # fmt: skip
    code, out, err = seal(capsys, *arguments, "--budget-s", 25)  # too little for the jobs that search
    assert code == 0 and " 0 left" not in out, err
    first = {p.name: p.read_bytes() for p in output.glob("untrained-*.json")}
    assert first
    code, out, err = seal(capsys, *arguments)
    assert code == 0 and "0 left" in out, out + err
    assert all((output / name).read_bytes() == content for name, content in first.items())
    assert not list(output.glob("*.failed.txt"))
    code, out, err = seal(capsys, "study", "--preset", "smollm2-4bit", "--output", output, "--summary")
    assert code == 0 and "quantized.md" in out, err
    rows = {(r["method"], r["data"]): r for r in driver.summarise(output)}
    assert set(rows) == {
        ("16 bits", None), ("NF4", None), ("columns", None), ("columns", "retrieval"), ("columns", "text"),
        ("QLoRA", "retrieval"), ("QLoRA", "text"), ("SEAL-C", "retrieval"), ("columns + SEAL-C", "retrieval"),
    }  # fmt: skip
    assert all(r["seeds"] == 2 for r in rows.values())
    assert rows["columns", "text"]["parameters"] == 4 * 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert rows["columns + SEAL-C", "retrieval"]["parameters"] == rows["columns", "text"]["parameters"] + 2 * 64
    chosen = json.loads((output / f"{plan.job_name('trained', 'columns', 4, 'text', 0)}.json").read_text())["training"]
    assert len(chosen["tried"]) == 2
    best = json.loads(min(chosen["tried"], key=chosen["tried"].get))
    assert chosen["column_lr"] == best["column_lr"]
    code, _, err = seal(capsys, *arguments[:-1], "low_rank_rates=[2e-3]")
    assert code == 1 and "got one with another low_rank_rates" in err
    code, _, err = seal(capsys, "study", "--preset", "smollm2-4bit", "--model", folder, "--output", tmp_path / "x")
    assert code == 1 and "text must be a file of English text" in err
