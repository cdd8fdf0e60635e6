"""What the jobs of a study share: one model in memory, trained and measured."""

import contextlib
import os
from collections.abc import Sequence

import torch

from ...adapters.attachment import attach, detach, load
from ...evaluation.runner import evaluate
from ...huggingface.loading import load_model
from ...training.loop import train
from ...training.recipe import GRANULARITIES
from ..comparison import TARGETS, VALIDATION, validation_loss
from ..runs import read_json_file
from ..study_jobs.drawn_samples import Drawn, Samples


class Workbench:
    """One model on one device, and everything a job does with it."""

    def __init__(self, model: str, folder: str, *, device: str = "auto", dtype: str = "default", workers: int = 0):
        self.name, self.folder, self.device, self.dtype = model, folder, device, dtype
        self.samples = Samples(model, workers)
        self.model, self.tokenizer = load_model(model, device=device, dtype=dtype, call="seal study")

    @property
    def cuda(self) -> bool:
        return self.model.device.type == "cuda"

    def load(self):
        """Another copy of the model, for what cannot be taken back."""
        return load_model(self.name, device=self.device, dtype=self.dtype, call="seal study")[0]

    # ------------------------------------------------------------------------------------------------- measuring

    def measure(self, task: str, lengths: Sequence[int], cases: int, seed: int, model=None) -> dict:
        """Scores by length, in the order of the cases, with the seconds and the first outputs."""
        drawn = Drawn(task, self.samples)
        for length in lengths:  # so that no waiting for samples counts as decoding
            self.samples.get(task, length, cases, seed, "test")
        found = evaluate(model or self.model, self.tokenizer, drawn, lengths, cases, seed=seed, progress=False)
        scores, outputs = {}, {}
        for record in found.records:
            scores.setdefault(str(record["length"]), []).append(round(record["score"], 4))
            shown = outputs.setdefault(str(record["length"]), [])
            if len(shown) < 3:
                shown.append({key: record[key] for key in ("answer", "output", "score")})
        return {"scores": scores, "seconds": round(found.seconds, 2), "outputs": outputs}

    # -------------------------------------------------------------------------------------------------- training

    @contextlib.contextmanager
    def adapted(self, method: str, model=None):
        """The model with a method's parameters at their start; afterwards it is as before."""
        model = model or self.model
        if method in GRANULARITIES:
            attach(model, GRANULARITIES[method])
            try:
                yield model
            finally:
                detach(model)
            return
        from peft import LoraConfig, get_peft_model

        frozen = {name: p.requires_grad for name, p in model.named_parameters()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # A is random, so that the adapter starts where any other run of it does
            config = LoraConfig(
                r=4, lora_alpha=8, target_modules=list(TARGETS), use_dora=method == "DoRA", task_type="CAUSAL_LM"
            )
            wrapped = get_peft_model(model, config).eval()
        try:
            yield wrapped
        finally:
            wrapped.unload()
            for name, p in model.named_parameters():
                p.requires_grad_(frozen[name])

    def train(self, model, task: str, length: int, count: int, lr: float, seed: int) -> dict:
        """Trains on the task's samples; what it took."""
        result = train(model, self.samples.get(task, length, count, seed, "train"), lr=lr, seed=seed, progress=False)
        return {
            "lr": lr,
            "parameters": result.parameters,
            "seconds": round(result.seconds, 2),
            "peak_memory": result.peak_memory,
            "first_loss": round(result.losses[0], 4),
            "last_losses": [round(x, 4) for x in result.losses[-5:]],
        }

    def search(
        self,
        method: str,
        task: str,
        length: int,
        count: int,
        rates: Sequence[float],
        seed: int,
        then,
        *,
        validate: bool = False,
    ):
        """Trains at every rate and calls ``then(model)`` at the one with the least loss on further training-split
        samples.

        Returns ``(training, what then returned)``; ``training["tried"]`` has the validation loss of every rate,
        ``"search_seconds"`` what all trainings took.  One rate is validated only with ``validate``.
        """
        wanted = validate or len(rates) > 1
        validation = self.samples.get(task, length, VALIDATION, seed + 1, "train") if wanted else None
        tried, spent, best = {}, 0.0, None
        for lr in rates:
            with self.adapted(method) as model:
                try:
                    training = self.train(model, task, length, count, lr, seed)
                except RuntimeError as error:  # a rate at which the loss is no longer finite is a finding
                    if "must stay finite" not in str(error):
                        raise
                    tried[f"{lr:g}"] = None
                    continue
                spent += training["seconds"]
                if validation is None:
                    return training, then(model)
                loss = validation_loss(model, validation)
                tried[f"{lr:g}"] = round(loss, 4)
                if best is None or loss < best[0]:
                    best = (
                        loss,
                        training,
                        {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad},
                    )
        if best is None:
            raise RuntimeError(f"{method} on {task}: the loss became infinite at every rate of {list(rates)}")
        _, training, values = best
        with self.adapted(method) as model, torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in values:
                    parameter.copy_(values[name])
            return {**training, "tried": tried, "search_seconds": round(spent, 2)}, then(model)

    # ---------------------------------------------------------------------------------------------------- scales

    def scales_folder(self, name: str) -> str:
        return os.path.join(self.folder, "scales", name)

    @contextlib.contextmanager
    def with_scales(self, name: str | None):
        """The model with the scales that a job has saved; None: as it is."""
        if name is None:
            yield self.model
            return
        load(self.model, self.scales_folder(name))
        try:
            yield self.model
        finally:
            detach(self.model)

    def result(self, job: str) -> dict:
        """What an earlier job found."""
        return read_json_file(os.path.join(self.folder, f"{job}.json"))
