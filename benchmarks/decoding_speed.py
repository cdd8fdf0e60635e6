"""Seconds that greedy decoding of a batch of prompts takes, by prompt length, and how often batched and single
outputs agree.

    python benchmarks/decoding_speed.py [--model DIR] [--lengths 512 2048 8000] [--cases 40] [--tokens 24] [--scales
    channel] [--output FILE]

Without ``--model`` it runs a random model of SmolLM2-135M's sizes.  Outputs never stop early, so that every run decodes
the same number of tokens.  A row holds, by prompt length, the seconds of three ways of decoding: transformers'
``generate`` in batches of 16,384 prompt tokens, the cache of fixed size step by step, and the same as a CUDA graph; and
how many prompts ``evaluate`` would read at once.  ``--output`` keeps the rows with the environment, and a second call
goes on with the lengths that are missing.
"""

import argparse
import json
import os
import time
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import seal_ops
from seal_ops.evaluation import decoding, static_decoding
from seal_ops.huggingface.loading import load_model, load_tokenizer, shipped
from seal_ops.ops.environment import facts
from seal_ops.utils.files import atomic_write
from seal_ops.utils.runs import differing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder; default: random weights of SmolLM2-135M's sizes")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8000])
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=24, help="new tokens a prompt")
    parser.add_argument("--scales", choices=["none", "head", "channel"], default="channel")
    parser.add_argument("--compared", type=int, default=4, help="prompts a length that are also decoded one by one")
    parser.add_argument("--output", metavar="FILE", help="JSON with the rows and the environment; continued if there")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model) if args.model else random_model()
    if args.scales != "none":
        seal_ops.attach(model, args.scales)
    settings = {
        "model": os.path.basename(os.path.normpath(args.model)) if args.model else "random, of SmolLM2-135M's sizes",
        "scales": args.scales,
        "cases": args.cases,
        "new": args.tokens,
        "compared": args.compared,
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        "dtype": str(model.dtype),
    }
    rows = stored(args.output, settings)
    for length in args.lengths:
        if any(row["tokens"] == length for row in rows):
            continue
        row = measured_row(model, tokenizer, length, args.cases, args.tokens, args.compared)
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.output:
            rows.sort(key=lambda row: row["tokens"])
            content = {"settings": settings, "environment": facts(), "rows": rows}
            atomic_write(args.output, json.dumps(content, indent=1) + "\n")


def stored(output, settings):
    """The rows of an earlier call with the same settings; ``ValueError`` where they were others."""
    if not output or not os.path.exists(output):
        return []
    with open(output, encoding="utf-8") as file:
        content = json.load(file)
    if names := differing(content["settings"], settings):
        raise ValueError(
            f"decoding_speed: output {output} must be of the same settings, got another {', '.join(names)}"
        )
    return content["rows"]


def measured_row(model, tokenizer, length, cases, tokens, compared):
    """Seconds by way of decoding at one prompt length, and the agreement of batched outputs with single ones."""
    generator = torch.Generator().manual_seed(length)  # whatever was measured before
    sizes = torch.randint(length - 12, length + 1, (cases,), generator=generator).sort().values
    most = min(4000, model.config.get_text_config().vocab_size)
    prompts = [torch.randint(min(300, most // 2), most, (int(n),), generator=generator).tolist() for n in sizes]
    row = {"tokens": length, "cases": cases, "new": tokens}
    for name in ("generate", "fixed cache", "CUDA graph"):
        if name == "CUDA graph" and model.device.type != "cuda":
            continue
        row[name] = round(measured(model, tokenizer, prompts, tokens, name)[0], 3)
    row["at once"] = decoding.rows_at_once(model, length + tokens)
    chosen = prompts[:: max(1, cases // compared)]
    whole = measured(model, tokenizer, prompts, tokens, "as it is", repeat=1)[1]
    alone = [measured(model, tokenizer, [p], tokens, "generate", repeat=1)[1][0] for p in chosen]
    agreeing = sum(whole[prompts.index(p)] == a for p, a in zip(chosen, alone, strict=True))
    row["batched as alone"] = f"{agreeing} of {len(chosen)}"
    return row


def random_model():
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100_000.0, tie_word_embeddings=True,
        eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()
    return model, load_tokenizer(shipped("models/seal-tiny"), "decoding_speed")


def measured(model, tokenizer, prompts, tokens, way, repeat=2):
    """``(seconds, token ids)`` of the best of ``repeat`` runs."""
    graph = {"fixed cache": False, "CUDA graph": True}.get(way)
    fixed = static_decoding.decode

    def decode(*args):
        return fixed(*args, graph=graph)

    best, found = float("inf"), None
    with (
        mock.patch.object(decoding, "_end_ids", lambda *_: set()),
        mock.patch.object(static_decoding, "decode", decode),
        mock.patch.object(decoding._Outputs, "texts", lambda self: self.new),
    ):
        if way == "generate":
            supports = mock.patch.object(static_decoding, "supports", lambda _: False)
        else:
            supports = mock.patch.object(static_decoding, "supports", static_decoding.supports)
        with supports:
            size = decoding.rows_at_once(model, max(map(len, prompts)) + tokens)
            for _ in range(repeat):
                started = time.monotonic()
                found = []
                for start in range(0, len(prompts), size):
                    part = prompts[start : start + size]
                    found += decoding.generate(model, tokenizer, part, max_new_tokens=tokens)
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                best = min(best, time.monotonic() - started)
    return best, found


if __name__ == "__main__":
    main()
