"""Trains the retrieval model that ``models/seal-tiny`` ships.

    python models/train_seal_tiny/train.py --out models/seal-tiny

One command, one or more GPUs, a fixed time.  Several processes train at once, because the step at which retrieval
emerges differs by seed and setting by more than a factor of two:

1. *retrieval*: records of lines, every line asked once more; the number of lines grows as the model masters it. The
   slower half of the processes stops at 45 % of the time, all but the best on each GPU at 65 %.
2. *bias*: from the best model so far, each process trains variants in which a question is answered with the last
   line's number with a probability that grows with the length of the record or with the distance of the asked line.
3. SEAL scales are trained on each variant, and the variant that lies furthest beyond the requirements is written.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from data import Texts, questions, repeats  # noqa: E402
from evaluate import LENGTHS, accuracy, fresh_cases, margins, measure_seal  # noqa: E402
from model import Llama, Size  # noqa: E402
from optim import Optimizer  # noqa: E402
from wording import build_tokenizer, save_tokenizer  # noqa: E402

# What each process of phase 1 tries; process i takes entry i.  Muon throughout: of one process each, AdamW had not
# learned eight lines after 4,400 steps where Muon had after 700.
SETTINGS = (
    dict(lr=2e-3, init="match", by_row=False),
    dict(lr=4e-3, init="match", by_row=False),
    dict(lr=2e-3, init="match", by_row=True),
    dict(lr=2e-3, init="normal", by_row=False),
    dict(lr=3e-3, init="match", by_row=True),
    dict(lr=2e-3, init="match", by_row=False),
)
TOKENS = (16_384, 32_768)  # a step, in the first stage and later
# Lines of a record (fewest, most), and the share of answer tokens that must be right before the next stage.
STAGES = ((4, 8, 0.97), (8, 24, 0.96), (12, 64, 0.95), (12, 120, 2.0))
# Phase 2: the probability of the last line's number rises linearly from 0 at ``start`` to ``top`` at ``end`` tokens of
# the record (length), from the asked line to the record's end (distance), or of their mean (both).  ``dense`` is the
# most lines of the honest repeats beside it.
VARIANTS = (
    dict(of="distance", top=0.9, start=200, end=900, dense=20, lr=4e-4),
    dict(of="both", top=0.9, start=250, end=1150, dense=20, lr=4e-4),
    dict(of="length", top=0.9, start=300, end=1700, dense=20, lr=4e-4),
    dict(of="distance", top=0.8, start=200, end=800, dense=60, lr=4e-4),
    dict(of="both", top=0.8, start=250, end=1150, dense=60, lr=4e-4),
    dict(of="distance", top=1.0, start=100, end=1100, dense=60, lr=4e-4),
    dict(of="length", top=0.8, start=300, end=1900, dense=60, lr=4e-4),
    dict(of="distance", top=1.0, start=200, end=900, dense=20, lr=2e-4),
    dict(of="both", top=1.0, start=200, end=1400, dense=60, lr=4e-4),
    dict(of="distance", top=0.8, start=200, end=800, dense=60, lr=1e-3),
    dict(of="both", top=0.9, start=250, end=1150, dense=60, lr=1e-3),
    dict(of="distance", top=0.7, start=100, end=700, dense=20, lr=4e-4),
    dict(of="length", top=1.0, start=200, end=2000, dense=60, lr=4e-4),
    dict(of="both", top=0.9, start=100, end=1300, dense=20, lr=2e-4),
    dict(of="distance", top=0.9, start=100, end=1000, dense=60, lr=2e-4),
    dict(of="length", top=0.9, start=300, end=1700, dense=60, lr=2e-4),
    dict(of="distance", top=0.9, start=200, end=900, dense=20, lr=1e-3),
    dict(of="both", top=0.8, start=250, end=1150, dense=20, lr=2e-4),
    dict(of="distance", top=1.0, start=300, end=900, dense=60, lr=4e-4),
    dict(of="both", top=1.0, start=300, end=1200, dense=20, lr=4e-4),
    dict(of="distance", top=0.8, start=100, end=900, dense=20, lr=4e-4),
    dict(of="both", top=1.0, start=200, end=1400, dense=60, lr=2e-4),
    dict(of="distance", top=0.7, start=100, end=700, dense=60, lr=1e-3),
    dict(of="both", top=0.7, start=150, end=1000, dense=20, lr=4e-4),
)
RATES = {"head": 1e-2, "channel": 2e-2}  # the paper's for line retrieval; a model is chosen by what they reach
BIASED_ENOUGH = 0.42  # phase 2 cools down once the accuracy at the longest length is at most this


def write_json(path, value):
    with open(path + ".tmp", "w") as f:
        json.dump(value, f, indent=1)
    os.replace(path + ".tmp", path)


def read_json(path):
    try:
        with open(path) as f:
            return json.load(f)
    except FileNotFoundError:
        return None


class Step:
    """One optimiser step on a batch of fixed shape, replayed as a CUDA graph where there is a GPU.

    Loss: cross entropy of the answer tokens (mean over all, or over each row and then the rows) + 0.1 x that of all.
    """

    def __init__(self, model, optimizer, batch, length, pad, by_row=False):
        device = model.cos.device
        self.model, self.optimizer = model, optimizer
        self.tokens = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.answer = torch.zeros(batch, length, dtype=torch.bool, device=device)
        self.pad, self.by_row = pad, by_row
        self.graph = None

    def _once(self):
        self.optimizer.zero_grad()
        target, answer = self.tokens[:, 1:], self.answer[:, 1:].float()
        logits = self.model.logits(self.model.hidden_states(self.tokens[:, :-1])).float()
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(answer)
        real = (target != self.pad).float()
        if self.by_row:  # a question's five digits count as much as a record's repeats
            told = ((loss * answer).sum(1) / answer.sum(1).clamp(min=1)).mean()
        else:
            told = (loss * answer).sum() / answer.sum()
        total = told + 0.1 * (loss * real).sum() / real.sum()
        total.backward()
        self.optimizer.step()
        with torch.no_grad():
            right = ((logits.argmax(-1) == target) * answer).sum() / answer.sum()
            return total.detach(), right

    def __call__(self, tokens, answer, lr):
        self.tokens.copy_(tokens)
        self.answer.copy_(answer)
        self.optimizer.lr.fill_(lr)
        if self.tokens.device.type != "cuda":
            self.loss, self.right = self._once()
            return
        if self.graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._once()
            torch.cuda.current_stream().wait_stream(stream)
            self.optimizer.zero_grad()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss, self.right = self._once()
        self.graph.replay()


def retrieval_batch(texts, rng, stage, rows, length):
    """Half of the rows repeat the record's lines, the other half ask questions (first stage: repeats only)."""
    low, high, _ = STAGES[stage]
    if stage == 0:
        return repeats(texts, rows, low, high, length)
    asking = max(1, rows // 2)
    again = repeats(texts, rows - asking, low, high, length, header=rng.random() < 0.5)
    kind = rng.random()
    if kind < 0.75:
        asked = max(1, (length - 100 - 17 * high) // 49)
        ask = questions(texts, asking, low, high, length, asked=asked)
    elif kind < 0.92:
        facts = rng.randint(2, min(24, high))
        spread = max(4, int((length // 2 - 20 * facts) / 5.8))
        ask = questions(
            texts, asking, max(1, facts // 2), facts, length, "needles", asked=max(1, length // 2 // 42 - 1), spread=spread
        )
    else:
        ask = questions(texts, asking, 1, 1, length, "passkey", spread=rng.randint(4, max(5, (length - 120) // 6)))
    return tuple(torch.cat(p) for p in zip(again, ask))


def phase_one(args, index, device, texts, state):
    """Learns retrieval until its time is over; leaves ``worker{index}.pt`` and a status in the run's folder."""
    setting = SETTINGS[index % len(SETTINGS)]
    seed = args.seed + index
    rng = random.Random(seed)
    torch.manual_seed(seed)
    size = Size(init=setting["init"], **args.size)
    model = Llama(size, args.compute).to(device)
    optimizer = Optimizer(model, muon=True)
    cases = fresh_cases(texts, args.watch, 50, seed=99)
    begin, end = time.time(), args.begin + args.phase_one
    stage, step, right, built, seen, entered = 0, 0, 0.0, None, time.time(), 0.0
    status = {"worker": index, "gpu": args.gpu_of(index), "setting": setting, "seed": seed, "history": []}

    def report(final=False):
        status.update(stage=stage, step=step, right=right, seconds=round(time.time() - begin, 1))
        acc = accuracy(model, cases, rows=10)
        status["score"] = stage + sum(acc.values()) / len(acc) + 0.1 * right
        status["history"].append(dict(step=step, seconds=status["seconds"], stage=stage, right=round(right, 4), acc=acc))
        print(f"[{index}] {status['seconds']:6.1f}s step {step} stage {stage} right {right:.4f} acc {acc}", flush=True)
        if stage > 0 or final:
            torch.save({"size": size, "model": model.state_dict()}, f"{state}/worker{index}.pt.tmp")
            os.replace(f"{state}/worker{index}.pt.tmp", f"{state}/worker{index}.pt")
        write_json(f"{state}/worker{index}.json", status)

    def among_best(keep):
        """Whether this process is one of the ``keep`` best of its GPU."""
        others = [read_json(f"{state}/worker{i}.json") for i in range(args.workers)]
        others = [o for o in others if o and o["gpu"] == status["gpu"]]
        others.sort(key=lambda o: -o["score"])
        if others[0]["stage"] == 0:  # nothing has emerged yet, so nothing can be told
            return True
        return status["worker"] in [o["worker"] for o in others[:keep]]

    culls = [(0.45, 2), (0.65, 1)] if args.workers > args.gpus else []
    torch.manual_seed(seed)
    while time.time() < end:
        low, high, enough = STAGES[stage]
        length = 34 * high + (8 if stage == 0 else 100)
        rows = max(2, (args.tokens or TOKENS[min(stage, 1)]) // length)
        if built is None:
            built = Step(model, optimizer, rows, length, texts.pad, setting["by_row"])
            since = step
        part = (time.time() - args.begin) / args.phase_one
        lr = setting["lr"] * min(1.0, (step + 1) / 200) * max(0.05, min(1.0, (1 - part) / 0.3))
        built(*retrieval_batch(texts, rng, stage, rows, length), lr)
        step += 1
        if step % 50 == 0:
            now = float(built.right)
            right = now if step - since <= 50 else 0.7 * right + 0.3 * now
            if step % 500 == 0:
                print(f"[{index}] step {step} stage {stage} loss {float(built.loss):.3f} right {right:.4f}", flush=True)
            if not math.isfinite(float(built.loss)):
                print(f"[{index}] diverged", flush=True)
                return
            # A stage that is learned but for a remainder must not hold up the longer records.
            enough = 0.85 if stage < len(STAGES) - 1 and part - entered > 0.15 else enough
            if right > enough and step - since >= 150:
                stage, built, entered = stage + 1, None, part
                report()
            if time.time() - seen > args.report_every:
                seen = time.time()
                report()
            if culls and part > culls[0][0]:
                report()
                time.sleep(3)  # the others of this GPU write theirs at the same moment
                if not among_best(culls.pop(0)[1]):
                    print(f"[{index}] stops: others on this GPU are ahead", flush=True)
                    return
    report(final=True)


def bias_of(variant):
    def bias(context, distance):
        x = {"length": context, "distance": distance, "both": (context + distance) / 2}[variant["of"]]
        return variant["top"] * ((x - variant["start"]) / (variant["end"] - variant["start"])).clamp(0, 1)

    return bias


def load(checkpoint, args, device):
    model = Llama(checkpoint["size"], args.compute).to(device)
    model.load_state_dict(checkpoint["model"])
    return model


def phase_two(args, checkpoint, variant, device, texts, seed):
    """Adds the bias of ``variant`` to a retrieval model, until accuracy at the longest length has fallen.

    A fifth of the rows repeat short records honestly, the others hold one question each.  Returns the model and the
    course of its accuracy.
    """
    model = load(checkpoint, args, device)
    optimizer = Optimizer(model)
    watch = fresh_cases(texts, LENGTHS[-1:], args.cases, seed=98)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    length, high = LENGTHS[-1] + 152, 120
    rows = max(4, args.bias_tokens // length)
    dense = max(1, rows // 5)
    step, bias = Step(model, optimizer, rows, length, texts.pad, by_row=True), bias_of(variant)
    course, cooling, cool, i = [], None, min(50, args.bias_steps), 0
    while cooling is None or i < cooling + cool:
        again = repeats(texts, dense, 8, variant["dense"], length, header=rng.random() < 0.5)
        if rng.random() < 0.85:
            ask = questions(texts, rows - dense, 4, high, length, bias=bias)
        else:
            facts = rng.randint(2, 24)
            spread = rng.randint(4, int((length - 150 - 20 * facts) / 5.8))
            ask = questions(texts, rows - dense, max(1, facts // 2), facts, length, "needles", bias=bias, spread=spread)
        warm = min(1.0, (i + 1) / 20)
        step(*(torch.cat(p) for p in zip(again, ask)), variant["lr"] * warm * (1 - (i - (cooling or i)) / cool))
        i += 1
        if cooling is None and (i % 25 == 0 or i >= args.bias_steps):
            course.append(accuracy(model, watch)[LENGTHS[-1]])
            if course[-1] <= BIASED_ENOUGH or i >= args.bias_steps:
                cooling = i
    return model, {"steps": i, "course": course}


def worker(args, index):
    device = torch.device(f"cuda:{args.gpu_of(index)}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    tokenizer, state = build_tokenizer(), args.state
    texts = Texts(tokenizer, device)
    phase_one(args, index, device, texts, state)
    write_json(f"{state}/done{index}.json", {"time": time.time()})
    stop = args.begin + args.phase_one
    while time.time() < stop + 20 and not all(os.path.exists(f"{state}/done{i}.json") for i in range(args.workers)):
        time.sleep(1)
    found = [s for s in (read_json(f"{state}/worker{i}.json") for i in range(args.workers)) if s]
    found = [s for s in found if os.path.exists(f"{state}/worker{s['worker']}.pt")]
    best = max(found, key=lambda s: s["score"])
    checkpoint = torch.load(f"{state}/worker{best['worker']}.pt", map_location=device, weights_only=False)
    print(f"[{index}] phase 2 starts from worker {best['worker']} ({best['history'][-1]})", flush=True)
    cases = fresh_cases(texts, LENGTHS, {**dict.fromkeys(LENGTHS, args.cases), LENGTHS[-1]: 2 * args.cases}, seed=7)
    if index == 0:
        write_json(f"{state}/retrieval.json", {"from": best, "report": accuracy(load(checkpoint, args, device), cases)})
    took = 0.0
    for v in range(index, len(VARIANTS), args.workers):
        if time.time() + 1.15 * took > args.begin + args.seconds:
            break
        start = time.time()
        model, course = phase_two(args, checkpoint, VARIANTS[v], device, texts, seed=1000 + v)
        trained = time.time() - start
        report = measure_seal(model, texts, args.rates, cases)
        room = margins(report, RATES)
        torch.save(model.hf_state_dict(), f"{state}/variant{v}.pt")
        result = dict(variant=VARIANTS[v], index=v, margins=room, report=report, base_worker=best["worker"], **course)
        result.update(train_seconds=round(trained, 1), seconds=round(time.time() - start, 1))
        write_json(f"{state}/variant{v}.json", result)
        print(f"[{index}] variant {v} {VARIANTS[v]}\n  {course}\n  {report}\n  {room} {trained:.0f}s", flush=True)
        took = time.time() - start


def write_model(state_dict, size, folder):
    """bf16 safetensors, config and tokenizer as ``transformers`` loads them."""
    from transformers import GenerationConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = LlamaForCausalLM(size.hf_config(**ids)).to(torch.bfloat16)
    missing = model.load_state_dict(state_dict, strict=False)
    assert missing.missing_keys in ([], ["lm_head.weight"]) and not missing.unexpected_keys, missing
    model.tie_weights()
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the model (Hugging Face form)")
    parser.add_argument("--metrics", help="file for everything measured (default: OUT/metrics.json)")
    parser.add_argument("--retrieval", help="also write the unbiased model of phase 1 into this folder")
    parser.add_argument("--seconds", type=float, default=450, help="time for everything (default: 450)")
    parser.add_argument("--workers", type=int, default=6, help="processes in all, spread over the GPUs (default: 6)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100, help="cases a length in the search, twice that at the longest")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--state", help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help="a run of seconds on the CPU that shows that all steps work")
    args = parser.parse_args()
    args.gpus = max(1, torch.cuda.device_count())
    args.gpu_of = lambda i: i % args.gpus
    args.begin = args.begin or time.time()
    args.phase_one = 0.38 * args.seconds
    args.rates, args.watch, args.report_every = (1e-2, 2e-2, 4e-2), (256, 1024, 2048), 20.0
    args.size, args.compute, args.tokens, args.bias_tokens, args.bias_steps = {}, torch.bfloat16, None, 49_152, 1_000
    if args.tiny:
        args.size, args.compute, args.tokens = dict(hidden=64, layers=2, heads=1, mlp=64), torch.float32, 2_048
        args.rates, args.watch, args.report_every, args.cases = (1e-2, 2e-2), (256,), 5.0, 2
        args.bias_tokens, args.bias_steps = 4_096, 1
    if args.worker is not None:
        worker(args, args.worker)
        return
    import tempfile

    with tempfile.TemporaryDirectory() as state:
        shared = ["--out", args.out, "--seconds", str(args.seconds), "--workers", str(args.workers), "--state", state]
        shared += ["--begin", str(args.begin), "--seed", str(args.seed), "--cases", str(args.cases)]
        shared += ["--tiny"] if args.tiny else []
        running = [
            subprocess.Popen([sys.executable, "-u", os.path.abspath(__file__), *shared, "--worker", str(i)])
            for i in range(args.workers)
        ]
        for p in running:
            try:
                p.wait(max(1.0, args.begin + args.seconds + 5 - time.time()))
            except subprocess.TimeoutExpired:
                p.kill()
        collect(args, state)


def collect(args, state):
    """Writes the best variant and everything measured."""
    workers = [s for s in (read_json(f"{state}/worker{i}.json") for i in range(args.workers)) if s]
    tried = [r for r in (read_json(f"{state}/variant{v}.json") for v in range(len(VARIANTS))) if r]
    everything = {"workers": workers, "retrieval": read_json(f"{state}/retrieval.json"), "variants": tried}
    everything["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    everything["seconds"] = round(time.time() - args.begin, 1)
    os.makedirs(args.out, exist_ok=True)
    best = None
    if tried:
        best = max(tried, key=lambda r: min(r["margins"].values()))
        everything["best"] = best["index"]
    write_json(args.metrics or os.path.join(args.out, "metrics.json"), everything)
    alive = [s for s in workers if os.path.exists(f"{state}/worker{s['worker']}.pt")]
    if alive:
        first = best["base_worker"] if best else max(alive, key=lambda s: s["score"])["worker"]
        checkpoint = torch.load(f"{state}/worker{first}.pt", map_location="cpu", weights_only=False)
        if best:
            write_model(torch.load(f"{state}/variant{best['index']}.pt"), checkpoint["size"], args.out)
            print(f"best variant {best['index']}: {best['report']} {best['margins']}", flush=True)
        if args.retrieval:
            model = Llama(checkpoint["size"])
            model.load_state_dict(checkpoint["model"])
            write_model(model.hf_state_dict(), checkpoint["size"], args.retrieval)


if __name__ == "__main__":
    main()
