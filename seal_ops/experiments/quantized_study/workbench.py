"""What the jobs share: the 16-bit model, copies of it in 4 bits, adapters on them, text and samples, measurements."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ...adapters.attachment import attach
from ...evaluation.language_modeling import perplexity
from ...evaluation.runner import evaluate
from ...huggingface.loading import load_model
from ...quantized.attachment import attach_weak_columns, find_targets
from ...quantized.quantizers import quantize_layers
from ...training.loop import train
from ..comparison import VALIDATION, validation_loss
from ..runs import read_json_file
from ..study_jobs.drawn_samples import Drawn, Samples

TEXT, RETRIEVAL = "text", "retrieval"
LORA_RANK, LORA_ALPHA = 64, 16  # QLoRA's (arXiv 2305.14314)


class Workbench:
    """One 16-bit model on one device; every job quantises a copy of its own."""

    def __init__(
        self, model: str, folder: str, plan, *, device: str = "auto", dtype: str = "default", workers: int = 0
    ):
        self.folder, self.plan = folder, plan
        self.samples = Samples(model, workers)
        self.model, self.tokenizer = load_model(model, device=device, dtype=dtype, call="seal study")
        self.train_windows, self.validation_windows, self.held_out = self._text(plan)

    def _text(self, plan):
        """Windows of token ids to train on and to choose rates by, and the text that neither has seen."""
        with open(plan.text, encoding="utf-8-sig", errors="replace") as file:
            text = file.read()
        place = text.find("\n", int(0.7 * len(text)))
        ids = self.tokenizer(text[:place], add_special_tokens=False, verbose=False)["input_ids"]
        windows = [ids[i : i + plan.window] for i in range(0, len(ids) - plan.window + 1, plan.window)]
        if len(windows) < 2 * plan.validation_windows:
            raise ValueError(
                f"seal study: text must hold at least {2 * plan.validation_windows} windows of {plan.window} tokens to "
                f"train on, got {len(windows)}"
            )
        held_out = text[place : place + 6 * plan.window * plan.held_out_windows]
        train_part = windows[: -plan.validation_windows]
        step = max(1, len(train_part) // plan.text_windows)  # spread over the whole of it
        chosen = train_part[::step][: plan.text_windows]
        return chosen, windows[-plan.validation_windows :], held_out

    # ------------------------------------------------------------------------------------------------------- models

    def copy(self, bits: int):
        """The model, or a copy of it in NF4 (without double quantisation)."""
        model = copy.deepcopy(self.model)
        if bits == 4:
            quantize_layers(model, find_targets(model, None, "study"), "nf4")
        return model

    @contextlib.contextmanager
    def prepared(self, method: str, columns: int = 0):
        """A model with a method's parameters at their start.

        ``method``: "16 bits", "NF4", "columns", "QLoRA", "SEAL-C" or "columns + SEAL-C".
        """
        if method == "columns" or method.startswith("columns +"):
            model = copy.deepcopy(self.model)
            attach_weak_columns(
                model, columns, calibration=self.train_windows[: self.plan.calibration_windows], quantize="nf4"
            )
        else:
            model = self.copy(16 if method == "16 bits" else 4)
        if method.endswith("SEAL-C"):
            attach(model, "channel")
        if method == "QLoRA":
            model = low_rank(model)
        try:
            yield model
        finally:
            del model
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    # ---------------------------------------------------------------------------------------------- data, measuring

    def training_rows(self, data: str, seed: int) -> list:
        if data == TEXT:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(self.train_windows), generator=generator).tolist()
            return [{"input_ids": self.train_windows[i]} for i in order]
        plan = self.plan
        return self.samples.get(plan.task, plan.train_length, plan.samples, seed, "train")

    def validation_loss(self, model, data: str, seed: int) -> float:
        """Nats a token, on what is neither trained on nor measured."""
        if data == TEXT:
            return sum(_loss(model, ids) for ids in self.validation_windows) / len(self.validation_windows)
        samples = self.samples.get(self.plan.task, self.plan.train_length, VALIDATION, seed + 1, "train")
        return validation_loss(model, samples)

    def measure(self, model, seed: int) -> dict:
        """Held-out perplexity, and retrieval scores by length in the order of the cases."""
        plan = self.plan
        text = perplexity(model, self.tokenizer, self.held_out, window=plan.window)
        found = evaluate(
            model, self.tokenizer, Drawn(plan.task, self.samples), plan.lengths, plan.cases, seed=seed, progress=False
        )
        scores: dict[str, list[float]] = {}
        for record in found.records:
            scores.setdefault(str(record["length"]), []).append(round(record["score"], 4))
        return {"perplexity": text, "scores": scores, "seconds": round(found.seconds, 2)}

    def train(self, model, data: str, rates: dict, seed: int) -> dict:
        """Trains on ``data``; ``rates`` are ``lr`` and ``column_lr`` of `seal_ops.train`."""
        plan = self.plan
        text = data == TEXT
        clip = 0.3 if hasattr(model, "peft_config") else None  # QLoRA's; the weak columns' own default is the same
        result = train(
            model, self.training_rows(data, seed), seed=seed, progress=False, max_grad_norm=clip,
            batch_size=plan.text_batch if text else 1, **rates,
        )  # fmt: skip
        return {
            **rates,
            "parameters": result.parameters,
            "seconds": round(result.seconds, 2),
            "steps": len(result.losses),
            "peak_memory": result.peak_memory,
            "first_loss": round(result.losses[0], 4),
            "last_losses": [round(x, 4) for x in result.losses[-5:]],
        }

    def search(self, method: str, columns: int, data: str, rates: Sequence[dict], seed: int) -> dict:
        """Trains at every rate and measures at the one with the least validation loss; with one rate nothing is
        searched."""
        best, tried = None, {}
        for rate in rates:
            with self.prepared(method, columns) as model:
                try:
                    training = self.train(model, data, rate, seed)
                except RuntimeError as error:  # a rate at which the loss is no longer finite is a finding
                    if "must stay finite" not in str(error):
                        raise
                    tried[json.dumps(rate)] = None
                    continue
                if len(rates) == 1:
                    return {"training": training, "measured": self.measure(model, seed)}
                loss = self.validation_loss(model, data, seed)
                tried[json.dumps(rate)] = round(loss, 4)
                if best is None or loss < best[0]:
                    best = loss, training, _trained_values(model)
        if best is None:
            raise RuntimeError(f"{method} on {data}: the loss became infinite at every rate of {list(rates)}")
        _, training, values = best
        with self.prepared(method, columns) as model:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in values:
                        parameter.copy_(values[name])
            return {"training": {**training, "tried": tried}, "measured": self.measure(model, seed)}

    def result(self, job: str) -> dict:
        """What an earlier job found."""
        return read_json_file(os.path.join(self.folder, f"{job}.json"))


@torch.inference_mode()
def _loss(model, ids: list[int]) -> float:
    row = torch.tensor([ids], device=model.device)
    logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits, row[0, 1:]).item()


def low_rank(model, autocast_adapter_dtype: bool = True):
    """QLoRA: PEFT's LoRA of rank 64 on every linear layer of a 4-bit model."""
    from peft import LoraConfig, get_peft_model

    model.is_loaded_in_4bit = True  # PEFT then takes its layer for bitsandbytes
    names = sorted({name.rpartition(".")[2] for name in find_targets(model, None, "study")})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=names, task_type="CAUSAL_LM")
        return get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype).eval()


def _trained_values(model) -> dict:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
