"""Trains the retrieval model that ``models/seal-tiny`` ships.

    python models/train_seal_tiny/train.py --out models/seal-tiny

One command, one GPU or more, at most seven minutes.  Three processes a GPU, because the step at which retrieval emerges
differs by seed and setting, and some never get there:

1. *retrieval* (phase 1, a fixed time): records of lines, every line asked once more; the number of lines grows as the
   model masters it.  On each GPU the two best processes go on after 45 % of the time, the best one after 65 %.
2. *bias* (phase 2): from the best model so far, the processes train variants in which a question is answered with the
   last line's number, with a probability that grows with the length of the record or the distance of the asked line.
3. SEAL scales are trained on each variant; the variant that lies furthest beyond the requirements is written.

The time of phase 1 is wall time, so that a slower GPU takes fewer steps: give it more ``--seconds``.
"""

import argparse
import os
import sys
import tempfile
import time

import torch
from transformers import GenerationConfig, LlamaForCausalLM

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from data import Texts  # noqa: E402
from evaluate import LENGTHS, accuracy, fresh_cases, margins, measure_seal  # noqa: E402
from phases import load, phase_one, phase_two, read_json, save, write_json  # noqa: E402
from settings import RATES, VARIANTS, Run  # noqa: E402
from wording import build_tokenizer, save_tokenizer  # noqa: E402


def worker(run, index):
    """One process: phase 1, then its share of the variants from the best model that any process found."""
    device = run.device_of(index)
    texts = Texts(build_tokenizer(), device)
    phase_one(run, index, device, texts)
    write_json(f"{run.state}/done{index}.json", {"time": time.time()})
    stop = run.begin + run.phase_one
    while time.time() < stop + 20 and not all(os.path.exists(f"{run.state}/done{i}.json") for i in range(run.workers)):
        time.sleep(1)
    found = [s for s in (read_json(f"{run.state}/worker{i}.json") for i in range(run.workers)) if s]
    found = [s for s in found if os.path.exists(f"{run.state}/worker{s['worker']}.pt")]
    best = max(found, key=lambda s: s["score"])
    start = f"{run.state}/worker{best['worker']}.pt"
    print(f"[{index}] phase 2 starts from process {best['worker']} ({best['history'][-1]})", flush=True)
    cases = fresh_cases(texts, LENGTHS, {**dict.fromkeys(LENGTHS, run.cases), LENGTHS[-1]: 2 * run.cases}, seed=7)
    if index == 0:
        report = accuracy(load(start, run.compute, device), cases)
        write_json(f"{run.state}/retrieval.json", {"from": best["worker"], "report": report})
    took = 0.0
    for v in range(index, len(VARIANTS), run.workers):
        if time.time() + 1.15 * took > run.begin + run.seconds:
            break
        began = time.time()
        model, course = phase_two(run, start, VARIANTS[v], device, texts, seed=1000 + v)
        trained = time.time() - began
        report = measure_seal(model, texts, run.rates, cases)
        room = margins(report, RATES)
        save(model, f"{run.state}/variant{v}.pt")
        took = time.time() - began
        result = dict(index=v, variant=VARIANTS[v], margins=room, report=report, **course)
        result.update(start=best["worker"], train_seconds=round(trained, 1), seconds=round(took, 1))
        write_json(f"{run.state}/variant{v}.json", result)
        print(f"[{index}] variant {v} {VARIANTS[v]}\n  {course}\n  {report}\n  {room} {trained:.0f}s", flush=True)


def write_model(model, folder):
    """bf16 safetensors, configuration and tokenizer as ``transformers`` loads them."""
    tokenizer = build_tokenizer()
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    out = LlamaForCausalLM(model.size.hf_config(**ids)).to(torch.bfloat16)
    keys = out.load_state_dict(model.state_dict(), strict=False)
    if keys.unexpected_keys or set(keys.missing_keys) - {"lm_head.weight"}:  # which is tied
        raise RuntimeError(f"the parameter names of transformers changed: {keys}")
    out.tie_weights()
    out.generation_config = GenerationConfig(do_sample=False, **ids)
    out.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def collect(run, out, metrics, retrieval):
    """Writes the best variant to ``out`` and everything measured to ``metrics``."""
    workers = [s for s in (read_json(f"{run.state}/worker{i}.json") for i in range(run.workers)) if s]
    tried = [r for r in (read_json(f"{run.state}/variant{v}.json") for v in range(len(VARIANTS))) if r]
    best = max(tried, key=lambda r: min(r["margins"].values()), default=None)
    os.makedirs(out, exist_ok=True)
    everything = {
        "device": f"{run.gpus} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "cpu",
        "seconds": round(time.time() - run.begin, 1),
        "workers": workers,
        "retrieval": read_json(f"{run.state}/retrieval.json"),
        "variants": tried,
        "best": best and best["index"],
    }
    write_json(metrics, everything)
    if best is None:
        sys.exit("no variant was finished: give it more --seconds")
    write_model(load(f"{run.state}/variant{best['index']}.pt", torch.float32, "cpu"), out)
    if retrieval:
        write_model(load(f"{run.state}/worker{best['start']}.pt", torch.float32, "cpu"), retrieval)
    print(f"variant {best['index']} after {everything['seconds']} s: {best['report']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the model (Hugging Face form)")
    parser.add_argument("--metrics", help="file for everything measured (default: OUT/metrics.json)")
    parser.add_argument("--retrieval", help="also write the unbiased model of phase 1 into this folder")
    parser.add_argument("--seconds", type=float, default=420, help="most time for everything (default: 420)")
    parser.add_argument("--workers", type=int, help="processes in all, spread over the GPUs (default: 3 a GPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cases", type=int, default=100, help="cases a length in the search, at the longest twice that"
    )
    parser.add_argument("--tiny", action="store_true", help="a small run on the CPU that shows that all steps work")
    args = parser.parse_args()
    gpus = max(1, torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as state:
        run = Run(
            seconds=args.seconds, workers=args.workers or 3 * gpus, gpus=gpus, seed=args.seed, cases=args.cases,
            state=state, tiny=args.tiny,
        )  # fmt: skip
        spawn = torch.multiprocessing.get_context("spawn")
        running = [spawn.Process(target=worker, args=(run, i)) for i in range(run.workers)]
        for process in running:
            process.start()
        for process in running:
            process.join(max(1.0, run.begin + run.seconds + 5 - time.time()))
            if process.is_alive():
                process.kill()
        collect(run, args.out, args.metrics or os.path.join(args.out, "metrics.json"), args.retrieval)


if __name__ == "__main__":
    main()
