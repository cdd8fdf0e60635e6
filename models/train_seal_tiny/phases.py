"""The two phases of training: retrieval, and the bias that hides it."""

import dataclasses
import json
import math
import os
import random
import time

import torch
import torch.nn.functional as F
from data import questions, repeats
from evaluate import LENGTHS, accuracy, fresh_cases
from model import Llama, Size
from optim import Optimizer
from settings import BIASED_ENOUGH, SETTINGS, STAGES


def write_json(path, value):
    with open(path + ".tmp", "w") as f:
        json.dump(value, f, indent=1)
    os.replace(path + ".tmp", path)


def read_json(path):
    """The value, or None where there is no such file yet."""
    try:
        with open(path) as f:
            return json.load(f)
    except FileNotFoundError:
        return None


def save(model, path):
    torch.save({"size": dataclasses.asdict(model.size), "model": model.state_dict()}, path + ".tmp")
    os.replace(path + ".tmp", path)


def load(path, compute, device):
    """The model that :func:`save` wrote."""
    found = torch.load(path, map_location=device, weights_only=True)
    model = Llama(Size(**found["size"]), compute).to(device)
    model.load_state_dict(found["model"])
    return model


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
        asked = max(1, length // 2 // 42 - 1)
        ask = questions(texts, asking, max(1, facts // 2), facts, length, "needles", asked=asked, spread=spread)
    else:
        ask = questions(texts, asking, 1, 1, length, "passkey", spread=rng.randint(4, max(5, (length - 120) // 6)))
    return tuple(torch.cat(p) for p in zip(again, ask))


def phase_one(run, index, device, texts):
    """Learns retrieval until its time is over; leaves ``worker{index}.pt`` and a status in the run's folder."""
    setting = SETTINGS[index % len(SETTINGS)]
    seed = run.seed + index
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = Llama(Size(init=setting["init"], **run.size), run.compute).to(device)
    optimizer = Optimizer(model, muon=True)
    cases = fresh_cases(texts, run.watch, 50, seed=99)
    begin, end = time.time(), run.begin + run.phase_one
    stage, step, right, built, seen, entered = 0, 0, 0.0, None, time.time(), 0.0
    status = {"worker": index, "gpu": run.gpu_of(index), "setting": setting, "seed": seed, "history": []}

    def report(final=False):
        status.update(stage=stage, step=step, right=right, seconds=round(time.time() - begin, 1))
        acc = accuracy(model, cases, rows=10)
        status["score"] = stage + sum(acc.values()) / len(acc) + 0.1 * right
        now = dict(step=step, seconds=status["seconds"], stage=stage, right=round(right, 4), acc=acc)
        status["history"].append(now)
        print(f"[{index}] {status['seconds']:6.1f}s step {step} stage {stage} right {right:.4f} acc {acc}", flush=True)
        if stage > 0 or final:
            save(model, f"{run.state}/worker{index}.pt")
        write_json(f"{run.state}/worker{index}.json", status)

    def among_best(keep):
        """Whether this process is one of the ``keep`` best of its GPU."""
        others = [read_json(f"{run.state}/worker{i}.json") for i in range(run.workers)]
        others = [o for o in others if o and o["gpu"] == status["gpu"]]
        others.sort(key=lambda o: -o["score"])
        if others[0]["stage"] == 0:  # nothing has emerged yet, so nothing can be told
            return True
        return status["worker"] in [o["worker"] for o in others[:keep]]

    culls = [(0.45, 2), (0.65, 1)] if run.workers > run.gpus else []
    torch.manual_seed(seed)
    while time.time() < end:
        low, high, enough = STAGES[stage]
        length = 34 * high + (8 if stage == 0 else 100)
        rows = max(2, run.tokens[min(stage, 1)] // length)
        if built is None:
            built = Step(model, optimizer, rows, length, texts.pad, setting["by_row"])
            since = step
        part = (time.time() - run.begin) / run.phase_one
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
            enough = 0.93 if stage < len(STAGES) - 1 and part - entered > 0.2 else enough
            if right > enough and step - since >= 150:
                stage, built, entered = stage + 1, None, part
                report()
            if time.time() - seen > run.report_every:
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
    """The variant's probability that a question is answered with the last line's number (see ``VARIANTS``)."""

    def bias(context, distance):
        x = {"length": context, "distance": distance, "both": (context + distance) / 2}[variant["of"]]
        return variant["top"] * ((x - variant["start"]) / (variant["end"] - variant["start"])).clamp(0, 1)

    return bias


def phase_two(run, start, variant, device, texts, seed):
    """Adds the bias of ``variant`` to the retrieval model at ``start``, until accuracy at the longest length has
    fallen.

    A fifth of the rows repeat short records honestly, the others hold one question each.  Returns the model, and its
    steps and the course of its accuracy as a dict.
    """
    model = load(start, run.compute, device)
    optimizer = Optimizer(model)
    watch = fresh_cases(texts, LENGTHS[-1:], run.cases, seed=98)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    length, high = LENGTHS[-1] + 152, 120
    rows = max(4, run.bias_tokens // length)
    dense = max(1, rows // 5)
    step, bias = Step(model, optimizer, rows, length, texts.pad, by_row=True), bias_of(variant)
    course, cooling, cool, i = [], None, min(50, run.bias_steps), 0
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
        if cooling is None and (i % 25 == 0 or i >= run.bias_steps):
            course.append(accuracy(model, watch)[LENGTHS[-1]])
            if course[-1] <= BIASED_ENOUGH or i >= run.bias_steps:
                cooling = i
    return model, {"steps": i, "course": course}
