"""What the jobs share: one model that is extended and brought back, text, and fine-tuning of copies."""

from __future__ import annotations

import contextlib

import torch

from ...evaluation.language_modeling import perplexity
from ...huggingface.context_extension.extending import extend, unextend
from ...huggingface.context_window import trained_length
from ...training.loop import train
from ...training.samples import Row
from ..extension_comparison import BASE
from ..pretrained_study import workbench as pretrained
from .plan import options_of

CALL = "seal study"


class Workbench(pretrained.Workbench):
    """`pretrained_study.workbench.Workbench` with a text, extensions and recipes."""

    def __init__(
        self, model: str, folder: str, plan, *, device: str = "auto", dtype: str = "default", workers: int = 0
    ):
        super().__init__(model, folder, device=device, dtype=dtype, workers=workers)
        self.plan, self.trained = plan, trained_length(self.model)
        if self.trained is None:
            raise ValueError(f"{CALL}: model must have a config that names its positions, got {model}")
        if min(plan.reaches) <= self.trained:
            raise ValueError(
                f"{CALL}: reaches must go beyond the {self.trained} tokens that {model} was trained on, got "
                f"{list(plan.reaches)}"
            )
        with open(plan.text, encoding="utf-8-sig", errors="replace") as file:
            self.text = file.read()
        place = self.text.find("\n", int(0.7 * len(self.text)))
        self.training_text, self.held_out = self.text[:place], self.text[place:]

    @contextlib.contextmanager
    def extended(self, method: str, reach: int):
        """``(model, facts)`` inside: the model under a method that is set up for ``reach`` tokens; None where the model
        cannot take it, which the facts then say."""
        facts = {"method": method, "reach": reach, "options": {}, "positions": self.trained, "refused": None}
        if method == BASE:
            yield self.model, facts
            return
        try:
            extension = extend(self.model, method, **options_of(method, reach, self.trained))
        except ValueError as error:
            yield None, {**facts, "refused": str(error)}
            return
        try:
            yield self.model, {**facts, "options": extension.options, "positions": extension.positions}
        finally:
            unextend(self.model)

    def perplexity(self, model, text: str, length: int, windows: int | None = None) -> dict:
        return perplexity(model, self.tokenizer, text, window=length, most=windows)

    def tune(self, recipe: str, length: int) -> dict:
        """Fine-tunes a copy of the model for ``length`` tokens by a recipe, at the best of the plan's rates; perplexity
        of the held-out text before and after, at the trained length and at ``length``."""
        rows, validation = self._rows(length)
        best, tried = None, {}
        for rate in self.plan.tuned_rates:
            try:
                model, training = self._tuned(recipe, length, rows, rate)
            except RuntimeError as error:  # a rate at which the loss is no longer finite is a finding
                if "must stay finite" not in str(error):
                    raise
                tried[f"{rate:g}"] = None
                continue
            loss = sum(_nats(model, row) for row in validation) / len(validation)
            tried[f"{rate:g}"] = round(loss, 4)
            if best is None or loss < best[0]:
                best = loss, model, training
            del model
        if best is None:
            raise RuntimeError(f"{recipe}: the loss became infinite at every rate of {list(self.plan.tuned_rates)}")
        _, model, training = best
        lengths = sorted({min(self.trained, length), length})
        found = {"training": {**training, "tried": tried}, "perplexity": self._held_out(model, lengths)}
        start = self.load()
        found["untrained"] = self._held_out(start, lengths)
        extend(start, self.plan.tuned_positions, factor=length / self.trained)
        return found | {"extended": self._held_out(start, lengths)}

    def _held_out(self, model, lengths) -> dict:
        return {str(n): self.perplexity(model, self.held_out, n) for n in lengths}

    def _rows(self, length: int) -> tuple[list[Row], list[list[int]]]:
        """One row of text a step, from the beginning again where the text ends; and windows for the choice of a
        rate."""
        ids = self.tokenizer(self.training_text, add_special_tokens=False, verbose=False)["input_ids"]
        windows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        aside = self.plan.tuned_validation
        if len(windows) <= aside:
            raise ValueError(
                f"{CALL}: text must hold more than {aside} windows of {length} tokens to train on, got {len(windows)}"
            )
        kept = windows[:-aside]
        steps = range(self.plan.tuned_steps)
        return [Row(kept[n % len(kept)], kept[n % len(kept)]) for n in steps], windows[-aside:]

    def _tuned(self, recipe: str, length: int, rows: list[Row], rate: float):
        result = train(
            self.load(), rows, recipe=recipe, recipe_options=dict(length=length, positions=self.plan.tuned_positions),
            lr=rate, seed=0, progress=False, gradient_checkpointing="selective" if self.cuda else True,
        )  # fmt: skip
        return result.model.eval(), {
            "lr": rate,
            "steps": len(result.losses),
            "parameters": result.parameters,
            "seconds": round(result.seconds, 2),
            "peak_memory": result.peak_memory,
            "first_loss": round(result.losses[0], 4),
            "last_losses": [round(x, 4) for x in result.losses[-5:]],
        }


@torch.inference_mode()
def _nats(model, ids: list[int]) -> float:
    row = torch.tensor([ids], device=model.device)
    logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, row[0, 1:]).item()
