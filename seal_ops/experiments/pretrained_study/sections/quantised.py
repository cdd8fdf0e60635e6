"""Scales on a 4-bit base."""

import torch

from ...study_jobs.queue import Job
from .shared import drawn, summary_line


def jobs(plan):
    seed, task = plan.seeds[0], plan.curve_task

    def run(bench):
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        lr = bench.result(f"main-{task}-{seed}")["training"]["SEAL-C"]["lr"]
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
        model = AutoModelForCausalLM.from_pretrained(
            bench.name, quantization_config=config, dtype=torch.bfloat16, device_map={"": bench.model.device}
        ).eval()
        if hasattr(model, "hf_device_map"):
            del model.hf_device_map  # one device: decoding may treat it like any other model
        kinds = {type(m).__name__ for m in model.modules()}
        measured = {"NF4": bench.measure(task, plan.lengths, plan.cases, seed, model)}
        with bench.adapted("SEAL-C", model):
            training = bench.train(model, task, plan.longest, plan.samples, lr, seed)
            measured["NF4, SEAL-C"] = bench.measure(task, plan.lengths, plan.cases, seed, model)
        return {
            "task": task,
            "modules": sorted(kinds),
            "weights_bytes": model.get_memory_footprint(),
            "training": {"SEAL-C": training},
            "measured": measured,
            "summary": summary_line(measured),
        }

    samples = drawn(plan, task, plan.lengths, plan.cases, seed, plan.longest)
    return [Job("quantised-nf4", run, 60, samples, (f"main-{task}-{seed}",))]
