"""Seconds a token that `generate` takes with scales attached: one adapter, several mixed over the rows, none.

    python benchmarks/serving_speed.py [--model DIR] [--lengths 2048 32768] [--batch 4] [--adapters 3] [--tokens 65]
    [--caches dynamic static] [--output FILE]

Without ``--model`` it runs a random model of SmolLM2-135M's sizes, with ``--sizes 8b`` of Llama-3.1-8B's.  The
contestants take turns: the model without scales under transformers' SDPA ("untouched"), with one channel adapter
("one"), and with as many as ``--adapters`` says, one a row in turn ("mixed").  A token's time is that of a long run
less that of a run of one token, over the tokens between.  With a static cache transformers compiles the step on a
GPU.  Ratios are medians over the rounds; ``--output`` keeps the rows with the environment.
"""

import argparse
import contextlib
import json
import os
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import seal_ops
from seal_ops.huggingface.loading import load_model
from seal_ops.ops.environment import facts
from seal_ops.utils.files import atomic_write

SIZES = {
    "135m": dict(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "8b": dict(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False,
    ),
}  # fmt: skip
CONTESTANTS = ("untouched", "one", "mixed")
TRIES = 5  # of a token's time, where other work on the machine takes longer than the tokens


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder; default: random weights")
    parser.add_argument("--sizes", choices=SIZES, default="135m", help="of the random model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 32_768], help="prompt tokens")
    parser.add_argument("--batch", type=int, default=4, help="prompts at once")
    parser.add_argument("--adapters", type=int, default=3, help="mixed over the rows")
    parser.add_argument("--tokens", type=int, default=65, help="new tokens of the long run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--caches", nargs="+", choices=["dynamic", "static"], default=["dynamic", "static"])
    parser.add_argument("--output", metavar="FILE", help="JSON with the rows and the environment")
    args = parser.parse_args(argv)
    model = load_model(args.model)[0] if args.model else random_model(args.sizes, max(args.lengths) + args.tokens)
    names = with_adapters(model, args.adapters)
    rows = []
    for length in args.lengths:
        for cache in args.caches:
            rows.append(measured_row(model, names, length, cache, args))
            print(json.dumps(rows[-1]), flush=True)
    if args.output:
        settings = {
            "model": os.path.basename(os.path.normpath(args.model)) if args.model else f"random, {args.sizes}",
            "adapters": args.adapters,
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
            "dtype": str(model.dtype),
        }
        content = {"settings": settings, "environment": facts(), "rows": rows}
        atomic_write(args.output, json.dumps(content, indent=1) + "\n")
    return rows


def random_model(sizes, longest):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        **SIZES[sizes], max_position_embeddings=longest, rope_theta=500_000.0, eos_token_id=None, pad_token_id=0
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def with_adapters(model, count):
    """Attaches channel adapters with random values; their names."""
    scales = seal_ops.attach(model, "channel")
    names = [f"adapter-{number}" for number in range(count)]
    for number, name in enumerate(names):
        scales.add_adapter(name, "channel")
        scales.set_adapter(name)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for _, scale in scales.items():
                scale.copy_(1 + 0.05 * torch.randn(scale.shape, generator=generator))
    return names


def measured_row(model, names, length, cache, args):
    """Seconds a token of every contestant, and the ratios, at one prompt length and with one kind of cache."""
    most = min(4000, model.config.get_text_config().vocab_size)
    ids = torch.randint(1, most, (args.batch, length), generator=torch.Generator().manual_seed(length))
    ids = ids.to(model.device)
    rows = [names[row % len(names)] for row in range(args.batch)]
    seconds = {name: [] for name in CONTESTANTS}
    for count in range(args.rounds + 1):
        for name in CONTESTANTS if count % 2 else CONTESTANTS[::-1]:
            options = {"adapter_names": rows} if name == "mixed" else {}
            with seal_ops.disabled(model) if name == "untouched" else contextlib.nullcontext():
                found = seconds_a_token(model, ids, cache, args.tokens, options)
            if count:  # the first round compiles, and fills the allocator's pools
                seconds[name].append(found)
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "tokens": length,
        "batch": args.batch,
        "cache": cache,
        "milliseconds a token": {name: round(1e3 * found, 4) for name, found in middle.items()},
        "one / untouched, tokens a second": round(ratio(seconds, "untouched", "one"), 3),
        "mixed / one, time": round(ratio(seconds, "mixed", "one"), 3),
    }


def ratio(seconds, numerator, denominator):
    """The median over the rounds of a ratio of two contestants."""
    return statistics.median(a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True))


def seconds_a_token(model, ids, cache, tokens, options):
    """Of a step of ``generate``, without what the prompt costs."""
    for _ in range(TRIES):
        spent = seconds_of(model, ids, cache, tokens, options) - seconds_of(model, ids, cache, 1, options)
        if spent > 0:
            return spent / (tokens - 1)
    raise SystemExit(
        f"{tokens} tokens took no longer than one, {TRIES} times: --tokens must be larger, or the machine idle"
    )


def seconds_of(model, ids, cache, new, options):
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new,
        cache_implementation=cache, **options,
    )  # fmt: skip
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
