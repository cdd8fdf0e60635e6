"""What the pages print runs: their Python, and their commands with their configuration files.

Everything is run as printed. Only the work is cut short: prompts, samples and cases are capped where they are drawn,
and the shipped model stands in for models that a page leaves open or fetches. A command runs, or `NOT_RUN`
says why not.
"""

import json
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest
import torch
import transformers
from printed import PAGES, ROOT, blocks, commands, is_fragment
from transformers import AutoModelForCausalLM, AutoTokenizer

import seal_ops
from seal_ops.cli.main import main
from seal_ops.tasks import Task

WITH_PYTHON = [page for page in PAGES if page.startswith("docs/") and blocks(page, "python")]
LONGEST, MOST = 1_600, 2  # tokens a sample fills, samples
SHORTER, FEWER, WRITTEN = 400, 1, 8  # in commands, which are many; tokens that are written


@pytest.fixture
def short(monkeypatch, tmp_path):
    """A folder with the shipped model in it, and tasks that draw little."""
    draw = Task.generate

    def generate(self, tokenizer, length, samples=50, seed=0, **options):
        return draw(self, tokenizer, min(length, LONGEST), min(samples, MOST), seed, **options)

    monkeypatch.setattr(Task, "generate", generate)
    (tmp_path / "models").mkdir()
    shutil.copytree(ROOT / "models/seal-tiny", tmp_path / "models/seal-tiny")
    (tmp_path / "book.txt").write_text("The number of line 12 is 345. " * 700)
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
    if page in ("docs/adapters.md", "docs/serving.md"):
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


@pytest.mark.parametrize("page", WITH_PYTHON)
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
        elif page == "docs/adapters.md" and number:
            known["model"] = names(page)["model"]
        exec(compile(block, f"{page}, block {number + 1}", "exec"), known)


# What is printed and not run here, and why not. `seal bench` without options runs: a smoke test on a CPU.
GPU, NETWORK, DEBIAN = "times a GPU", "fetches a model or data", "joins texts that not every system has"
PROCESSES = "starts several processes; tests/training/test_parallel.py does"
COLUMNS = "wants a wider model than the shipped one; tests/quantized/test_commands_columns.py runs it on a small one"
NOT_RUN = {
    "make real": NETWORK,
    "seal demo --model smollm2": NETWORK,
    "make test": "is the suite that this test belongs to",
    "make test VENV=.venv-newest TORCH=torch": "is that suite too, under a torch of 5 GB",
    "make lint": "runs no code of the package; .ci/run runs it",
    "make gpu-test": GPU,
    "pip install .": "tests/package/test_package.py installs the package",
    "pip install 'seal_ops[harness]'": NETWORK,
    ". .venv/bin/activate": "belongs to the environment that `make demo` makes",
    "PYTHONPATH=. .venv/bin/pytest tests/adapters -x -q": "is a part of the suite",
    "python tests/fixtures/family_table.py": "takes minutes; tests/huggingface/test_families.py runs the parts",
    "pytest benchmarks --suite headline --benchmark-json=out.json": GPU,
    "seal bench": "tests/bench runs it; under Triton's interpreter, where another test chose it, it takes minutes",
    "seal bench --suite headline": GPU,
    "seal bench --suite models --ops rope_attention": GPU,
    "seal bench --shape qwen3-14b:16k:2 --only seal-cuda,sdpa-cudnn": GPU,
    "seal bench --fa3 FOLDER": GPU,
    "seal bench --suite decode --fa3 FOLDER": GPU,
    "seal bench --suite headline --ops attention --only seal-cuda,fa3,fa4 --fa3 FOLDER --row-ms 100": GPU,
    "seal bench --suite headline --ops rope_attention,rope,attention_o_proj": GPU,
    "seal bench --suite headline --part 1/3 --name headline": GPU,
    "seal bench --suite headline --part 1/3 --name headline --resume": GPU,
    "seal bench --merge benchmarks/results/headline-part1of3.json benchmarks/results/headline-part2of3.json "
    "--name headline": "needs the files of the two lines above it; tests/bench merges",
    "seal harness --model smollm2 --scales out/channel --tasks longeval_lines niah_single_1 niah_multikey_1 "
    "--lengths 4096 --cases 50": NETWORK,
    "seal harness --model lmsys/longchat-7b-v1.5-32k --scales out/longchat-7b/adapters/SEAL-C-0.02 --tasks "
    "longbench_single longbench_multi mmlu --output out/longbench.json": NETWORK,
    "seal study --preset smollm2 --output study --workers 2 --text english.txt --budget-s 420": NETWORK,
    "seal study --preset smollm2-context --text english_long.txt --output context --workers 2 --budget-s 1500": NETWORK,
    "seal study --preset smollm2-context --output context --summary": "needs the files of the line above it; "
    "tests/experiments/test_context_study.py runs a whole study and its summary",
    "seal study --output study": "takes a minute even when cut short; tests/cli/test_commands.py runs a whole study",
    "(cd /usr/share/common-licenses && cat GPL-3 Apache-2.0 Artistic MPL-2.0 GFDL-1.3 CC0-1.0) > english.txt": DEBIAN,
    """python3.11 -c "from pydoc_data.topics import topics; print('\\n\\n'.join(topics[k] for k in sorted(topics)))" """
    "| head -c 200000 >> english.txt": DEBIAN,
    "pip install gguf accelerate": NETWORK,
    "pip install bitsandbytes": NETWORK,
    "seal bench --suite masks": GPU,
    "benchmarks/run_all.sh OUT training recipe decode masks": GPU,
    "torchrun --nproc_per_node=4 benchmarks/sequence_parallel.py --length 262144 --output sequence-4.json": GPU,
    "python -m pytest tests/gpu/test_gpu_parallel.py": "wants two GPUs",
    "torchrun --nproc_per_node=4 -m seal_ops train --model NAME --granularity channel --task lines --length 8192 "
    "--accumulate 4 --output my-scales": PROCESSES,
    "torchrun --nproc_per_node=2 examples/several_gpus.py --model NAME --accumulate 2 --output my-scales": PROCESSES,
    "accelerate launch --num_processes 2 examples/several_gpus.py --model NAME --accumulate 2 "
    "--output my-scales": PROCESSES,
    "torchrun --nproc_per_node=4 examples/several_gpus.py --model NAME --length 131072 --sequence-parallel "
    "--output my-scales": PROCESSES,
    "seal bench --suite training": GPU,
    "seal quantize --model smollm2 --weak-columns 128 --calibration english.txt --output smollm2-nf4": COLUMNS,
    "seal train --model smollm2 --weak-columns 128 --quantize nf4 --task multikey --length 4000 "
    "--output tuned": COLUMNS,
    "seal train --model smollm2 --weak-columns 128 --quantize nf4 --granularity channel --task multikey --length 4000 "
    "--output both": COLUMNS,
    "seal train --model smollm2 --weak-columns 128 --quantize nf4 --text chats.jsonl --output chatty": COLUMNS,
    "seal eval --model smollm2 --weak-columns both --scales both --task multikey --lengths 2000 4000 "
    "--output both.json": COLUMNS,
    "seal merge --model smollm2 --weak-columns both --scales both --output plain": COLUMNS,
    "python benchmarks/quantized_training.py --output qeft_8b.json": GPU,
    "python benchmarks/quantized_training.py --output qeft_8b.json --only training --steps 2 --sizes 8x2048 1x8192 "
    '1x31744 --methods "QLoRA, autocast" "QLoRA, bf16 adapters" "weak columns, planned" '
    '"weak columns in bf16, planned"': GPU,
    "python benchmarks/serving_speed.py --sizes 8b --lengths 2048 --caches static --rounds 3": GPU,
    "seal study --preset smollm2-4bit --text english.txt --output study": COLUMNS,
    "seal study --preset smollm2-4bit --output study --summary": COLUMNS,
}
PRINTED = {page: [c for c in commands(page) if not is_fragment(c)] for page in PAGES}


@pytest.fixture
def little_work(short, monkeypatch):
    """Few and short samples and cases, whatever a command asks for; the lengths keep their names."""
    from seal_ops.evaluation import runner
    from seal_ops.experiments import comparison, demo, head_importance, quadrants, study, transfer_matrix

    monkeypatch.setitem(globals(), "LONGEST", SHORTER)
    monkeypatch.setitem(globals(), "MOST", FEWER)
    measure, look = runner.evaluate, head_importance.measure_head_importance

    def evaluate(model, tokenizer, task, lengths, cases=50, **options):
        return measure(model, tokenizer, task, lengths, min(cases, MOST), **{"max_new_tokens": WRITTEN, **options})

    def measure_head_importance(model, tokenizer, task, lengths, cases=20, **options):
        return look(model, tokenizer, task, lengths, min(cases, MOST), **options)

    for module in (runner, comparison, demo, quadrants, transfer_matrix):
        monkeypatch.setattr(module, "evaluate", evaluate)
    for module in (head_importance, study):
        monkeypatch.setattr(module, "measure_head_importance", measure_head_importance)
    rows = [
        {"context": f"The ball of house {i} is {colour}. " * 20, "input": f"Of which colour is the ball of house {i}?",
         "answers": [colour]}
        for i, colour in enumerate(["red", "green", "blue", "white"] * 5)
    ]  # fmt: skip
    (short / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return short


@pytest.mark.parametrize("page", [page for page, printed in PRINTED.items() if printed])
def test_commands_run_as_printed(page, little_work, capsys):
    if page == "docs/real_model.md":
        shutil.copytree(ROOT / "results/smollm2", "study")  # what the page's study left
    for text in blocks(page, "yaml"):
        name, command = re.search(r"# (\S+\.yaml): seal (.*)", text).groups()
        pathlib.Path(name).write_text(text)
        run(["seal", *shlex.split(command)], command, capsys)
    for command in PRINTED[page]:
        if command.text not in NOT_RUN:
            words = command.words if "--preset" in command.words else map(shipped_name, command.words)
            run(list(words), command.text, capsys)


def shipped_name(word: str) -> str:
    """The shipped model in the place of one that a page leaves open, or that lies on the hub."""
    return "models/seal-tiny" if word in ("NAME", "smollm2") or word.startswith("lmsys/") else word


def run(words, text, capsys):
    if words[0] == "make":  # what it does once the environment is there
        script = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        lines = [shlex.split(line) for line in script.splitlines() if line.startswith(".venv/bin/seal ")]
        assert lines, f"{text}: is neither run nor listed with a reason"
        for line in lines:
            run(["seal", *line[1:]], text, capsys)
    elif words[:3] == ["python", "-m", "seal_ops"]:
        run(["seal", *words[3:]], text, capsys)
    else:
        # Under the interpreter a benchmark takes minutes: a run's time limit, not a sentence, would tell of a new one.
        timed = words[:2] == ["seal", "bench"]
        assert words[0] == "seal" and not timed, f"{text}: is neither run nor listed with a reason"
        assert main(words[1:]) == 0, f"{text}: {capsys.readouterr().err}"


def test_the_list_of_what_is_not_run_is_true():
    printed = {command.text for page in PAGES for command in PRINTED[page]}
    assert set(NOT_RUN) <= printed, "printed nowhere"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for text in NOT_RUN:
        if text.startswith("make "):
            assert re.search(rf"^{text.split()[1]}:", makefile, re.M), text
