"""What the pages print runs: their Python, and the commands of the pages for newcomers, with their configuration files.

Everything is run as printed. Only the work is cut short: prompts, samples and cases are capped where they are drawn.
"""

import pathlib
import re
import shlex
import shutil

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import seal_ops
from seal_ops.cli.main import main
from seal_ops.tasks import Task

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = sorted(p.name for p in (ROOT / "docs").glob("*.md") if "```python" in p.read_text(encoding="utf-8"))
LONGEST, MOST = 1_600, 2  # tokens a sample fills, samples


@pytest.fixture
def short(monkeypatch, tmp_path):
    """A folder with the shipped model in it, and tasks that draw little."""
    draw = Task.generate

    def generate(self, tokenizer, length, samples=50, seed=0, **options):
        return draw(self, tokenizer, min(length, LONGEST), min(samples, MOST), seed, **options)

    monkeypatch.setattr(Task, "generate", generate)
    (tmp_path / "models").mkdir()
    shutil.copytree(ROOT / "models/seal-tiny", tmp_path / "models/seal-tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def few_cases(monkeypatch):
    from seal_ops.evaluation import runner

    measure = runner.evaluate

    def evaluate(model, tokenizer, task, lengths, cases=50, **options):
        lengths = sorted({min(n, LONGEST) for n in lengths})
        return measure(model, tokenizer, task, lengths, min(cases, MOST), **options)

    monkeypatch.setattr(seal_ops, "evaluate", evaluate, raising=False)
    monkeypatch.setattr(runner, "evaluate", evaluate)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M | re.S)


def names(page: str) -> dict:
    """What a page takes for granted."""
    model = AutoModelForCausalLM.from_pretrained("models/seal-tiny")
    tokenizer = AutoTokenizer.from_pretrained("models/seal-tiny")
    samples = seal_ops.tasks.lines(tokenizer, length=300, samples=2)
    found = {
        "seal_ops": seal_ops,
        "transformers": transformers,
        "model": model,
        "tokenizer": tokenizer,
        "samples": samples,
    }
    if page == "adapters.md":
        for name, value in (("short-context", 0.5), ("long-context", 2.0)):
            scales = seal_ops.attach(model, "head")
            for _, scale in scales.items():
                scale.data.fill_(value)
            scales.save_pretrained(name)
            seal_ops.detach(model)
        found["arguments"] = transformers.TrainingArguments(
            "trainer", max_steps=2, save_steps=1, per_device_train_batch_size=1, remove_unused_columns=False,
            report_to=[], use_cpu=True,
        )  # fmt: skip
        found["data"] = samples
        found["batch_of_three"] = {"input_ids": torch.tensor([samples[0].input_ids[:20]] * 3)}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_python_runs_as_printed(page, short, few_cases, monkeypatch):
    if page == "qeft.md":
        pytest.importorskip("bitsandbytes")
    known = names(page)
    for number, block in enumerate(blocks(page, "python")):
        if "resume_from_checkpoint=True" in block:  # which takes an earlier run for granted
            first = names(page)["model"]
            seal_ops.attach(first, "channel")
            known["model"] = first
            collate = seal_ops.Collator()
            monkeypatch.setattr(
                transformers, "Trainer",
                lambda *a, _trainer=transformers.Trainer, **k: _trainer(*a, data_collator=collate, **k),
            )  # fmt: skip
            earlier = transformers.Trainer(
                first, known["arguments"], train_dataset=known["data"], callbacks=[seal_ops.SealCallback()]
            )
            earlier.train()
        elif page == "adapters.md" and number:
            known["model"] = names(page)["model"]
        exec(compile(block, f"{page}, block {number + 1}", "exec"), known)


def commands(page: str) -> list[list[str]]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    text = "\n".join(re.findall(r"^```(?:bash|console|sh)\n(.*?)^```", text, re.M | re.S))
    return [
        shlex.split(line, comments=True)[1:]
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith("seal ")
    ]


@pytest.mark.parametrize("page", ["quick_start.md", "training.md"])
def test_commands_run_as_printed(page, short, few_cases, capsys):
    for yaml in blocks(page, "yaml"):
        name, command = re.search(r"# (\S+\.yaml): seal (.*)", yaml).groups()
        pathlib.Path(name).write_text(yaml)
        assert main(shlex.split(command)) == 0, f"seal {command}: {capsys.readouterr().err}"
    ran = []
    for words in commands(page):
        if "smollm2" in words or words[0] == "report":  # needs a network; needs the demo's folder
            continue
        assert main(words) == 0, f"seal {shlex.join(words)}: {capsys.readouterr().err}"
        ran.append(words[0])
    assert {"eval", "train", "merge"} <= set(ran)
