"""Training scales and weak columns: SEAL's recipe (arXiv 2501.15225, section 4) as a short, repeatable, resumable loop.

AdamW at a constant rate, one epoch, one sample a step, cross entropy on the answer tokens only.  Logits are computed at
the label positions alone: at 31k tokens and a vocabulary of 32k the full ones would take 4 GB in fp32.

The same parameters train inside transformers' ``Trainer``: give it a list of samples, :class:`seal_ops.Collator` and
``remove_unused_columns=False``.
"""

import contextlib
import functools
import gc
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields

import torch

from ..adapters.saving import folders_beside, save_trained
from ..huggingface.context_window import warn_beyond_window
from ..huggingface.identity import fingerprint
from ..huggingface.modes import mode
from ..huggingface.origin import provenance
from ..huggingface.wrappers import check_module
from ..tasks.base import IGNORE_INDEX
from ..utils.arguments import integer, number, path, shown
from ..utils.files import atomic_write, check_folder
from ..utils.progress import bar
from . import groups
from .checkpoint import NAME as CHECKPOINT
from .checkpoint import load_checkpoint, random_state, save_checkpoint
from .collator import Collator
from .frozen_linears.conversion import FORMATS, converted_linears, convertible
from .frozen_linears.gradient_error import LARGE_ERROR, probe_of, relative_error
from .long_context import LEARNING_RATE, prepare, recipe_of, training_masks
from .losses import summed_cross_entropy
from .memory_plan import memory as memories
from .memory_plan.planning import SETTINGS, Plan, Planner
from .processes import Processes
from .recipe import COLUMNS_CLIP, NAMES
from .samples import check_vocabulary, to_rows
from .texts import packed_texts

RESULT = "training.json"
MOST_SEED = 1 << 40  # so that the seeds of all epochs fit into 64 bits


@dataclass
class TrainResult:
    """What a training run did.

    Attributes:
        losses: mean cross entropy of the answer tokens (nats), one value an optimiser step.
        lr: the learning rate; of weak columns, where only they are trained.
        parameters: how many numbers were trained.
        seconds: wall time, summed over resumed runs.
        peak_memory: bytes: the most allocated on the GPU during the run; on the CPU the largest size of the process.
        settings: the recipe, as given and completed, with the tasks and lengths that the samples name.
        plan: what the layers kept for the backward pass: how many of them what, ``expected_peak`` bytes beside
            ``measured_peak`` (with ``gradient_checkpointing="auto"``; on the CPU the latter is that of the process).
            Empty where a run that was continued had no step left.
        frozen_linears: of a run with ``frozen_linears="fp8"``: the layers and bytes that were converted,
            ``gradient_error`` and the ``tokens`` that it was taken on; else empty.
        provenance: the trained model and versions, for people; empty without ``output_dir``.
        model: what was trained: the model that was given, or what the recipe put round it.
    """

    losses: list[float]
    lr: float
    parameters: int
    seconds: float
    peak_memory: int
    settings: dict = field(default_factory=dict)
    plan: dict = field(default_factory=dict)
    frozen_linears: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)
    model: object = field(default=None, repr=False, compare=False)


def train(
    model,
    samples: Iterable,
    *,
    recipe: str | None = None,
    recipe_options: dict | None = None,
    tokenizer=None,
    chat_template=None,
    chat_template_kwargs: dict | None = None,
    lr: float | None = None,
    column_lr: float | None = None,
    epochs: int = 1,
    batch_size: int = 1,
    accumulate: int = 1,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    max_grad_norm: float | None = None,
    seed: int = 0,
    gradient_checkpointing: bool | str = "auto",
    memory: int | None = None,
    frozen_linears: str | None = None,
    output_dir: str | os.PathLike | None = None,
    checkpoint_every: int = 10,
    resume: bool = False,
    on_step: Callable[[int, float], None] | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Trains the scales and weak columns of ``model`` (or whatever else of it requires gradients) on ``samples``.

    Args:
        model: a causal language model with scales attached (:func:`seal_ops.attach`), with weak columns
            (:func:`seal_ops.attach_weak_columns`), or both, or a frozen one with another adapter (PEFT), which then
            needs ``lr``.
        samples: samples of a task (:mod:`seal_ops.tasks`), or dicts, in a list or a ``datasets.Dataset``: token ids
            with labels, prompt and answer, conversations or texts; see :func:`seal_ops.training.samples.to_rows`.
        recipe: "longlora" or "sinklora": puts LoRA, trainable embeddings and norms on a plain ``model``, and trains
            them with attention in groups on texts of a longer context; "full_attention" is the same without groups,
            which costs more.  ``samples`` may then be a text file or a
            ``.jsonl`` file of objects with ``text``, packed into rows.  The trained PEFT model is the result's
            ``model``; it attends in full.
        recipe_options: ``length``, the longer context in tokens, and those of
            :class:`seal_ops.training.long_context.LongContextRecipe`.
        tokenizer, chat_template, chat_template_kwargs: for samples that are text.
        lr: constant learning rate; None for the paper's: 1e-2 (head), 2e-2 (channel) or 2e-5 (a recipe).  It is worth a
            search: see docs/training.md.
        column_lr: constant rate of weak columns; None for QEFT's by their number: 5e-6 for 128, 1.4e-5 for 8.  Where
            nothing else is trained, ``lr`` means the same.
        epochs: passes over the samples, each in an order of its own drawn from ``seed``.
        batch_size: samples in one forward pass, padded on the right.
        accumulate: forward passes in one optimiser step; the loss is the mean over all answer tokens of the step.
            Several processes (``torch.distributed``) divide them among themselves, so it must be a multiple of their
            number; the result is that of one process.
        weight_decay: AdamW's; the paper's scales are not decayed.
        betas: AdamW's.
        max_grad_norm: clip the gradient's norm; None for no clipping, and with weak columns for QEFT's 0.3
            (``math.inf`` then for none).
        seed: order of the samples and dropout, if the model has any.
        gradient_checkpointing: "auto" plans for each layer what it keeps, from sizes that are measured and the memory
            that is free, and recomputes only what that asks for (:func:`seal_ops.plan` shows it).  False keeps
            everything; "selective" keeps the outputs of the fused attention and recomputes the rest, which costs
            little time; True recomputes each layer in the backward pass.
        memory: for "auto": bytes that a step may take beside what is in use, as of :func:`seal_ops.plan`; None for what
            is free on the device, less a reserve.
        frozen_linears: "fp8" multiplies with the frozen ``nn.Linear`` weights of the decoder layers in float8_e4m3fn
            while the run lasts; the 16-bit weights come back bit for bit.  The result says by how much the first
            gradients differ.  None keeps 16 bits.
        output_dir: folder for the trained scales, ``training.json`` and the checkpoint.
        checkpoint_every: optimiser steps between checkpoints.
        resume: continue from the checkpoint in ``output_dir`` if there is one; on the CPU the result is bit for bit
            that of an uninterrupted run (on a GPU with ``torch.use_deterministic_algorithms(True)``).
        on_step: called as ``on_step(step, loss)`` after each optimiser step, counted from 1.
        progress: draw a bar; None draws where stderr is a terminal.

    Returns:
        A :class:`TrainResult`.

    Raises:
        ValueError: nothing to train, scales that are not fp32, no samples, a bad setting, or a checkpoint of another
            run.
        RuntimeError: a trained parameter without a finite gradient at the first step (it is named), or a loss that is
            not finite.
        torch.OutOfMemoryError: a step does not fit; with "auto" only after plans that keep less did not fit either.
    """
    check_module(model, "train")
    if not torch.is_grad_enabled():
        raise ValueError("seal_ops.train: gradients must be on, got a call inside torch.no_grad or inference_mode")
    checkpoint_every = integer("seal_ops.train", "checkpoint_every", checkpoint_every, 1)
    if on_step is not None and not callable(on_step):
        raise ValueError(f"seal_ops.train: on_step must be a function, got {shown(on_step)}")
    if gradient_checkpointing not in ("auto", *SETTINGS):
        raise ValueError(
            "seal_ops.train: gradient_checkpointing must be 'auto', False, True or 'selective', got "
            f"{gradient_checkpointing!r}"
        )
    if frozen_linears not in (None, *FORMATS):
        raise ValueError(f"seal_ops.train: frozen_linears must be None or 'fp8', got {shown(frozen_linears)}")
    if memory is not None:
        memory = integer("seal_ops.train", "memory", memory, 1)
        if gradient_checkpointing != "auto":
            raise ValueError(
                f"seal_ops.train: memory needs gradient_checkpointing='auto', got {gradient_checkpointing!r}"
            )
    if resume and output_dir is None:
        raise ValueError("seal_ops.train: resume needs output_dir, got None")
    if recipe is None and recipe_options is not None:
        raise ValueError(f"seal_ops.train: recipe must be given with recipe_options, got None and {recipe_options}")
    longer = None if recipe is None else recipe_of(recipe, recipe_options or {})
    if longer is not None and isinstance(samples, (str, os.PathLike)):
        samples = packed_texts(samples, tokenizer, longer.length, "seal_ops.train")
    samples = to_rows(samples, tokenizer, chat_template, chat_template_kwargs)
    if frozen_linears is not None:
        convertible(model, "seal_ops.train", frozen=longer is None)  # a recipe freezes the weights
    masks = contextlib.nullcontext()
    if longer is not None:
        model, patch = prepare(model, longer, seed)
        masks, lr = training_masks(patch), LEARNING_RATE if lr is None else lr
    rates = (lr, column_lr)
    run = _Run(
        model, samples, rates, epochs, batch_size, accumulate, weight_decay, betas, max_grad_norm, seed, longer,
        frozen_linears,
    )  # fmt: skip
    checkpoint = None
    if output_dir is not None:
        folder = path("seal_ops.train", "output_dir", output_dir)
        checkpoint = os.path.join(check_folder(folder, "seal_ops.train", "output_dir"), CHECKPOINT)

    with run.processes.alone_in(output_dir, "seal_ops.train"):
        cuda, tile = run.device.type == "cuda", True
        with torch.random.fork_rng(devices=[run.device] if cuda else []), masks, mode(model, True), run:
            torch.manual_seed(seed)
            processes = run.processes
            processes.begin(run.trained, run.settings, run.samples)
            if checkpoint and not processes.agree(resume and os.path.exists(checkpoint)):
                # Of an earlier run: nothing in the folder may pass for this one's.
                for name in (RESULT, CHECKPOINT) if processes.main else ():
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(output_dir, name))
            elif checkpoint:
                tile = run.go_on(checkpoint)
            if checkpoint:
                _ = run.identity  # by all processes, where they hold the weights together
            if len(run.losses) < run.steps:
                run.follow(gradient_checkpointing, tile, memory)
            if cuda:
                torch.cuda.reset_peak_memory_stats(run.device)
            earlier, started = run.seconds, time.monotonic()
            with bar(run.steps, f"training {run.describe()}", progress if processes.main else False) as update:
                update(len(run.losses))
                while len(run.losses) < run.steps:
                    loss = run.step()
                    run.seconds = earlier + time.monotonic() - started
                    done = len(run.losses)
                    if checkpoint and (done % checkpoint_every == 0 or done == run.steps):
                        run.keep(checkpoint)
                    update(1, f"loss {loss:.3f}")
                    if on_step is not None:
                        on_step(done, loss)
        peak = torch.cuda.max_memory_allocated(run.device) if cuda else _largest_size()
        count = sum(p.numel() for p in run.trained.values())
        origin = {} if output_dir is None else provenance(model)
        kept = {} if run.plan is None else {**run.plan.facts(), "measured_peak": peak}
        result = TrainResult(
            run.losses, run.settings["lr"], count, run.seconds, peak, run.settings, kept, run.linears, origin, model
        )
        if output_dir is not None:
            if run.scales is not None:
                run.scales.card.trained(result.settings)
            if processes.main:
                _save(model, run.scales, run.columns, output_dir)
                atomic_write(os.path.join(output_dir, RESULT), json.dumps(_facts(result), indent=1) + "\n")
            processes.wait()
        return result


def _save(model, scales, columns, folder):
    """What was trained.  Weak columns lie in the folder itself, and scales trained with them in a folder of it."""
    if columns is not None:
        columns.save_pretrained(folder)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and not groups.is_column(name)]
    if columns is None or not all("seal_scales." in name for name in trained):
        save_trained(model, scales, folder)
    elif scales is not None:
        scales.save_to(folders_beside(scales, folder))


def _facts(result: TrainResult) -> dict:
    return {f.name: getattr(result, f.name) for f in fields(result) if f.name != "model"}


class _Run:
    """The state of one training run: what a checkpoint holds, and one optimiser step."""

    def __init__(
        self, model, samples, rates, epochs, batch_size, accumulate, weight_decay, betas, max_grad_norm, seed,
        longer=None, frozen_linears=None,
    ):  # fmt: skip
        self.model, self.samples = model, samples
        self.processes = Processes.of_run(model, len(samples), batch_size, accumulate)
        self.scales = getattr(model, "seal_scales", None)
        self.trained = _trained(model, self.scales)
        _check_adapter(model, self.trained)
        self.device = next(iter(self.trained.values())).device
        # The first weights may be on the disk, as accelerate leaves them.
        self.input_device = next(p.device for p in model.parameters() if not p.is_meta)
        check_vocabulary(samples, model, "seal_ops.train")
        warn_beyond_window(model, max(map(len, samples)), "seal_ops.train")
        call = "seal_ops.train"
        epochs = integer(call, "epochs", epochs, 1)
        batch_size, accumulate = integer(call, "batch_size", batch_size, 1), integer(call, "accumulate", accumulate, 1)
        weight_decay, betas = number(call, "weight_decay", weight_decay, 0), _betas(betas)
        seed = integer(call, "seed", seed, -MOST_SEED, MOST_SEED)
        if max_grad_norm is not None:
            max_grad_norm = number(call, "max_grad_norm", max_grad_norm, above=0, infinite=True)
        lr, column_lr = groups.rates(model, *rates, "train")
        if column_lr is not None and max_grad_norm is None:
            max_grad_norm = COLUMNS_CLIP
        self.settings = {
            "granularity": None if self.scales is None else self.scales.config.granularity,
            "samples": len(self.samples),
            "tasks": sorted({sample.meta["task"] for sample in samples if "task" in getattr(sample, "meta", ())}),
            "tokens": max(map(len, self.samples)),
            "lr": float(column_lr if lr is None else lr),
            "epochs": epochs,
            "batch_size": batch_size,
            "accumulate": accumulate,
            "weight_decay": weight_decay,
            "betas": list(betas),
            "max_grad_norm": max_grad_norm,
            "seed": seed,
        }
        self.columns = getattr(model, "seal_weak_columns", None)
        if self.columns is not None:
            self.settings |= {"columns": self.columns.columns, "column_lr": column_lr}
        if longer is not None:
            self.settings["recipe"] = asdict(longer)
        if frozen_linears is not None:
            self.settings["frozen_linears"] = frozen_linears
            if self.processes.meet_in_forward:
                raise ValueError(
                    f"seal_ops.train: frozen_linears='{frozen_linears}' needs forward passes that a process runs "
                    f"alone, got tensor or sequence parallelism"
                )
        self.steps = epochs * -(-len(self.samples) // (batch_size * accumulate))
        self.optimizer = torch.optim.AdamW(
            groups.groups_at(model, lr, column_lr), betas=betas, weight_decay=weight_decay
        )
        self.collate = Collator(label_positions_only=True)
        self.losses: list[float] = []
        self.seconds = 0.0
        self.plan: Plan | None = None
        self._planner: Planner | None = None
        self._may_lower = False
        self._running, self._converted = contextlib.ExitStack(), contextlib.ExitStack()
        self.linears: dict = {}  # what is in fp8, and by how much the first gradients differ

    def __enter__(self):
        return self

    def __exit__(self, *error):
        try:
            self._running.close()
        finally:
            self._converted.close()

    def follow(self, setting: bool | str, tile: int | None | bool, allowed: int | None = None) -> None:
        """Plans the steps as `train`'s ``gradient_checkpointing`` says, and runs the model so from now on.

        ``tile``: of the run that this one continues, whose bits it decides; True for none.  ``allowed``: bytes of a
        step; None for what is free.
        """
        length, rows = self.settings["tokens"], min(self.settings["batch_size"], len(self.samples))
        most = max(sum(label != IGNORE_INDEX for label in sample.labels[1:]) for sample in self.samples)
        padded = rows > 1 and len({len(sample) for sample in self.samples}) > 1
        ids = max(self.samples, key=len).input_ids
        processes = self.processes
        self._planner = Planner(
            self.model, length, min(length, most * rows), rows, padded, ids, not processes.meet_in_forward,
            processes.least, self.settings.get("frozen_linears"),
        )  # fmt: skip
        self._setting = setting
        self._convert()
        self._may_lower = setting == "auto" and processes.count == 1  # others would go on without this one
        planner = self._planner
        self._run_as(planner.plan(allowed, tile) if setting == "auto" else planner.uniform(setting, tile))
        if setting == "auto" and any("measuring it failed" in note for note in self.plan.notes):
            warnings.warn(f"seal_ops.train: {'; '.join(self.plan.notes)}", stacklevel=3)
        if not self.plan.fits:
            warnings.warn(f"seal_ops.train: the step may not fit into memory\n{self.plan}", stacklevel=3)

    def _convert(self) -> None:
        """Puts the frozen linear layers into fp8 where that is asked for, and states the error of the gradients."""
        form, before, expected = self.settings.get("frozen_linears"), self.linears, None
        if form is None:
            return
        first = next(self._micro_batches(0))[0]
        probe = probe_of(first.input_ids, first.labels)
        if not before:
            expected = self._gradients(probe)
        converted = self._converted.enter_context(converted_linears(self.model, form, "seal_ops.train"))
        if expected is not None:
            error = relative_error(self._gradients(probe), expected)
            before = {"gradient_error": error, "tokens": len(probe)}
            if error is not None and not error <= LARGE_ERROR:
                warnings.warn(
                    f"seal_ops.train: in {form} the first gradients are {100 * error:.0f} % from those in 16 bits; "
                    f"such scales are worth a comparison with a run in 16 bits",
                    stacklevel=4,
                )
        self.linears = before | converted.facts()

    def _gradients(self, row) -> list[torch.Tensor]:
        """Of all that is trained, on one row; the random state stays."""
        planner, leaves = self._planner, list(self.trained.values())
        with torch.random.fork_rng(devices=self._gpus()), planner.running(planner.uniform(True)) as self._execution:
            torch.manual_seed(self.settings["seed"])
            found = torch.autograd.grad(self._loss([row]), leaves, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found)]

    def _run_as(self, plan: Plan) -> None:
        self._running.close()
        self.plan, self._execution = plan, self._running.enter_context(self._planner.running(plan))

    def keep(self, checkpoint: str) -> None:
        """Writes the checkpoint; all processes must call this, and the first writes."""
        random = self.processes.all(random_state(self.trained))
        if self.processes.main:
            save_checkpoint(
                checkpoint, self.trained, self.optimizer, self.losses, self.seconds, self.identity, self.plan.tile,
                self.linears, random,
            )  # fmt: skip

    def go_on(self, checkpoint: str) -> int | None:
        """Takes the state over from a checkpoint; returns its tile."""
        processes = self.processes
        found = load_checkpoint(checkpoint, self.trained, self.optimizer, self.identity, processes.rank)
        self.losses, self.seconds, tile, self.linears, count = found
        if count not in (None, processes.count) and processes.main:
            warnings.warn(
                f"seal_ops.train: {checkpoint} was written by {count} process{'es' if count > 1 else ''} and goes on "
                f"with {processes.count}: gradients are summed in another order, so the last bits may differ, and "
                f"dropout draws other numbers",
                stacklevel=3,
            )
        return tile

    def describe(self):
        kind = "weak columns" if self.columns is not None else "adapter"
        return f"{NAMES.get(self.settings['granularity'], kind)}, lr {self.settings['lr']:g}"

    def step(self) -> float:
        """One optimiser step; returns and records the mean loss of its answer tokens."""
        processes, micro_batches = self.processes, list(self._micro_batches(len(self.losses)))
        labels = (label for batch in micro_batches for sample in batch for label in sample.labels[1:])
        tokens = sum(label != IGNORE_INDEX for label in labels)
        mine, total = processes.share(micro_batches), None
        while total is None:
            random = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in self._gpus()]
            try:
                total = self._accumulated(mine, tokens)
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
            if total is None:  # not inside `except`, which keeps the tensors of the failed step alive
                self._lower(reason)
                torch.set_rng_state(random[0])
                for device, state in zip(self._gpus(), random[1]):
                    torch.cuda.set_rng_state(state, device)
        if not self.losses and mine:
            _check_gradients(self.trained)
        processes.add_up(self.trained, total)
        value = total.item()
        if not torch.isfinite(total):
            raise RuntimeError(
                f"seal_ops.train: the loss must stay finite, got {value} at step {len(self.losses) + 1} with "
                f"lr {self.settings['lr']:g}; try a lower rate"
            )
        if self.settings["max_grad_norm"] is not None:
            torch.nn.utils.clip_grad_norm_(list(self.trained.values()), self.settings["max_grad_norm"])
        self.optimizer.step()
        self.losses.append(value)
        return value

    def _accumulated(self, micro_batches, tokens) -> torch.Tensor:
        """The step's loss, its gradients in the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for batch in micro_batches:
            loss = self._loss(batch) / tokens
            if not loss.requires_grad:
                raise RuntimeError(
                    "seal_ops.train: the loss must depend on what is trained, got one that does not; inside "
                    "seal_ops.disabled a model computes without its scales, and some quantised layers pass no gradient"
                )
            loss.backward()
            total += loss.detach().to(self.device)
        return total

    def _gpus(self):
        return [self.device] if self.device.type == "cuda" else []

    def _lower(self, reason: str) -> None:
        """Goes on with a plan that keeps less, and says so; raises OutOfMemoryError, one sentence, where none is."""
        self.optimizer.zero_grad(set_to_none=True)
        self._running.close()  # the samples of another plan are to meet the model itself
        gc.collect()
        memories.give_back(self.device)
        before = self.plan
        step = f"a step of {before.batch_size} x {before.length} tokens does not fit into memory"
        found = self._planner.lower(before) if self._may_lower else None
        if found is None:
            first = "" if self._setting == "auto" else "gradient_checkpointing='auto', "
            raise torch.OutOfMemoryError(
                f"seal_ops.train: {step} with {before.summary()}; try {first}a smaller batch_size with accumulate, "
                f"shorter samples, or a model in 4 bits ({reason})"
            )
        self._run_as(found)
        warnings.warn(
            f"seal_ops.train: {step} with {before.summary()}; going on with {found.summary()} ({reason})", stacklevel=3
        )

    def _micro_batches(self, step) -> Iterator[list]:
        size, per_step = self.settings["batch_size"], self.settings["batch_size"] * self.settings["accumulate"]
        epoch, place = divmod(step, self.steps // self.settings["epochs"])
        generator = torch.Generator().manual_seed(self.settings["seed"] * 1_000_003 + epoch)
        order = torch.randperm(len(self.samples), generator=generator).tolist()
        chosen = order[place * per_step : (place + 1) * per_step]
        for start in range(0, len(chosen), size):
            yield [self.samples[i] for i in chosen[start : start + size]]

    def _loss(self, samples):
        """Sum of the answer tokens' cross entropy."""
        batch = self.processes.tokens(self.collate(samples))
        inputs = {"input_ids": batch["input_ids"].to(self.input_device), "use_cache": False}
        if "position_ids" in batch:
            inputs["position_ids"] = batch["position_ids"].to(self.input_device)
        elif len({len(sample) for sample in samples}) > 1:
            inputs["attention_mask"] = batch["attention_mask"].to(self.input_device)
        keep = batch["logits_to_keep"]  # on the CPU: it indexes on whichever device the last layer is
        logits = self._execution.logits_at(self.model, keep, **inputs)
        targets = batch["shift_labels"].to(logits.device)
        return summed_cross_entropy(logits.flatten(0, 1), targets.flatten())

    @functools.cached_property
    def identity(self) -> str:
        """Hash of everything that decides the outcome apart from the trained values."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        digest.update(fingerprint(self.model, trainable=False).encode())
        for name, parameter in self.trained.items():
            digest.update(f"{name}{list(parameter.shape)}".encode())
        for sample in self.samples:
            digest.update(json.dumps([sample.input_ids, sample.labels]).encode())
        return digest.hexdigest()


def _betas(betas) -> tuple[float, float]:
    try:
        first, second = (number("seal_ops.train", "betas", beta, 0) for beta in betas)
    except (TypeError, ValueError):
        first = second = 1.0
    if not (first < 1 and second < 1):
        raise ValueError(f"seal_ops.train: betas must be two numbers from 0 to below 1, got {shown(betas)}")
    return first, second


def _trained(model, scales) -> dict[str, torch.nn.Parameter]:
    """The parameters that require gradients, by name; ``ValueError`` where that cannot be meant."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if scales is None and (not trained or len(trained) == sum(1 for _ in model.parameters())):
        state = "every parameter trainable" if trained else "no trainable parameter"
        raise ValueError(
            f"seal_ops.train: model must have scales attached (seal_ops.attach(model, 'head') or 'channel') or weak "
            f"columns (seal_ops.attach_weak_columns), got a {type(model).__name__} without scales and with {state}"
        )
    if scales is not None:
        for layer, scale in scales.items():
            if not scale.requires_grad:
                raise ValueError(f"seal_ops.train: every scale must require gradients, got layer {layer}'s frozen")
            if scale.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"seal_ops.train: scales must be torch.float32 (near 1 a 16-bit step is larger than the optimiser's), "  # noqa: E501
                    f"got {scale.dtype} in layer {layer}"
                )
    return trained


def _check_adapter(model, trained):
    config = getattr(model, "active_peft_config", None)
    kind = getattr(config, "peft_type", None)
    if getattr(kind, "value", kind) == "ADALORA" and any("lora_" in name for name in trained):
        raise ValueError(
            "seal_ops.train: model must have an adapter of fixed rank to train, got PEFT's AdaLoRA, which has to "
            "choose its ranks after each step and adds a term to the loss; freeze it, or train it in a loop of your own"
        )


def _check_gradients(trained):
    for name, parameter in trained.items():
        if parameter.grad is None or not torch.isfinite(parameter.grad).all():
            got = "no gradient" if parameter.grad is None else "a gradient that is not finite"
            raise RuntimeError(
                f"seal_ops.train: every trained parameter needs a finite gradient at the first step, got {got} for {name}"  # noqa: E501
                + (" (with gradient checkpointing, use_reentrant must be False)" if parameter.grad is None else "")
            )


def _largest_size():
    """Largest resident size of this process so far, in bytes (0 where the system does not say)."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
