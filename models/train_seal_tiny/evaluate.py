"""Retrieval accuracy of the training model, and SEAL's scales trained on it in plain PyTorch."""

import torch
import torch.nn.functional as F
from data import lines_for, retrieval_cases

LENGTHS = (256, 512, 1024, 1536, 2048)
SLACK = 64  # columns beyond the nominal length, so that no answer is cut


def fresh_cases(texts, lengths, cases, seed):
    """``{length: (tokens, sentence mask, digit mask)}``, the same for the same seed."""
    torch.manual_seed(seed)
    out = {}
    for length in lengths:
        n = cases[length] if isinstance(cases, dict) else cases
        parts = [retrieval_cases(texts, min(50, n - i), lines_for(length), length + SLACK) for i in range(0, n, 50)]
        out[length] = tuple(torch.cat(p) for p in zip(*parts))
    return out


@torch.no_grad()
def accuracy(model, cases, scales=None, rows=25):
    """Share of cases whose whole answer sentence is the greedy continuation, by length.

    Every token of the sentence is the most probable one given the sentence so far: exactly the cases in which greedy
    decoding writes this sentence, found in one forward pass.
    """
    result = {}
    for length, (tokens, sentence, _) in cases.items():
        right = 0
        for i in range(0, len(tokens), rows):
            t, m = tokens[i : i + rows], sentence[i : i + rows, 1:]
            hidden = model.hidden_states(t[:, :-1], scales)
            wrong = torch.zeros_like(m)
            wrong[m] = model.logits(hidden[m]).argmax(-1) != t[:, 1:][m]
            right += int((~wrong.any(1)).sum())
        result[length] = right / len(tokens)
    return result


def train_scales(model, texts, granularity, lr, length=LENGTHS[-1], samples=50, seed=1):
    """SEAL: AdamW at a constant rate, batch 1, one epoch, cross entropy of the answer sentence; scales ``[layers]``."""
    size = model.size
    shape = (size.heads,) if granularity == "head" else (size.heads, size.head_dim)
    device = model.cos.device
    scales = [torch.ones(shape, device=device, requires_grad=True) for _ in range(size.layers)]
    optimizer = torch.optim.AdamW(scales, lr=lr, weight_decay=0.0)
    tokens, sentence, _ = fresh_cases(texts, [length], samples, seed)[length]
    frozen = [p.requires_grad_(False) for p in model.parameters()]
    for i in range(samples):
        t, m = tokens[i : i + 1], sentence[i : i + 1, 1:]
        hidden = model.hidden_states(t[:, :-1], scales)
        F.cross_entropy(model.logits(hidden[m]).float(), t[:, 1:][m]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for p in frozen:
        p.requires_grad_(True)
    return [s.detach() for s in scales]


def measure_seal(model, texts, rates, cases, granularities=("head", "channel")):
    """Base accuracy by length and, for every granularity and rate, the accuracy with trained scales."""
    report = {"base": accuracy(model, cases)}
    for granularity in granularities:
        for lr in rates:
            scales = train_scales(model, texts, granularity, lr)
            report[f"{granularity} lr={lr:g}"] = accuracy(model, cases, scales)
    return report


def margins(report, rates, short=(256, 512), long=LENGTHS[-1]):
    """How far a report lies beyond what the model must show; each number is negative where it falls short.

    base at most 0.45 at the longest length, SEAL-H at least 0.25 and SEAL-C at least 0.35 above it, short lengths at
    least 0.9 and kept within 0.05 by both, no step between two lengths above 0.45.

    Args:
        rates: the learning rate of each granularity that counts.
    """
    base, lengths = report["base"], sorted(report["base"])
    out = {"base": 0.45 - base[long], "short": min(base[n] for n in short) - 0.9}
    for granularity, gain in (("head", 0.25), ("channel", 0.35)):
        acc = report[f"{granularity} lr={rates[granularity]:g}"]
        out[granularity] = acc[long] - base[long] - gain
        out[f"{granularity} short"] = 0.05 + min(acc[n] - base[n] for n in short)
    out["steady"] = 0.45 - max(base[a] - base[b] for a, b in zip(lengths, lengths[1:]))
    return out
