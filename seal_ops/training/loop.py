"""Training scales and weak columns: SEAL's recipe (arXiv 2501.15225, section 4) as a short, repeatable, resumable loop.

AdamW at a constant rate, one epoch, one sample a step, cross entropy on the answer tokens only.  Logits are computed at
the label positions alone: at 31k tokens and a vocabulary of 32k the full ones would take 4 GB in fp32.

The same parameters train inside transformers' ``Trainer``: give it a list of samples, :class:`seal_ops.Collator` and
``remove_unused_columns=False``.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields

import torch

from ..huggingface.context_window import warn_beyond_window
from ..huggingface.modes import mode
from ..huggingface.origin import provenance
from ..huggingface.wrappers import check_module
from ..utils.progress import bar
from . import groups
from .checkpoint import Progress
from .frozen_linears.conversion import convertible
from .frozen_linears.gradient_error import convert_and_compare
from .long_context import LEARNING_RATE, prepare, training_masks
from .memory_plan import memory as memories
from .memory_plan.planned_model import PlannedModel
from .processes import Processes
from .recipe import NAMES
from .run_folder import RunFolder
from .sample_order import SampleOrder
from .samples import check_vocabulary, to_rows
from .settings import Settings
from .step import OptimizerStep
from .texts import packed_texts


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
    settings = Settings(
        recipe=recipe, recipe_options=recipe_options, lr=lr, column_lr=column_lr, epochs=epochs, batch_size=batch_size,
        accumulate=accumulate, weight_decay=weight_decay, betas=betas, max_grad_norm=max_grad_norm, seed=seed,
        gradient_checkpointing=gradient_checkpointing, memory=memory, frozen_linears=frozen_linears,
        output_dir=output_dir, checkpoint_every=checkpoint_every, resume=resume, on_step=on_step,
    )  # fmt: skip
    longer = settings.long_context
    if longer is not None and isinstance(samples, (str, os.PathLike)):
        samples = packed_texts(samples, tokenizer, longer.length, "seal_ops.train")
    samples = to_rows(samples, tokenizer, chat_template, chat_template_kwargs)
    if settings.frozen_linears is not None:
        convertible(model, "seal_ops.train", frozen=longer is None)  # a recipe freezes the weights
    check_vocabulary(samples, model, "seal_ops.train")
    lr, masks = settings.lr, contextlib.nullcontext()
    if longer is not None:
        model, patch = prepare(model, longer, settings.seed)
        lr, masks = LEARNING_RATE if lr is None else lr, training_masks(patch)

    processes = Processes.of_run(model, len(samples), settings.batch_size, settings.accumulate)
    if settings.frozen_linears is not None and processes.meet_in_forward:
        raise ValueError(
            f"seal_ops.train: frozen_linears='{settings.frozen_linears}' needs forward passes that a process runs "
            f"alone, got tensor or sequence parallelism"
        )
    trained = groups.trained_parameters(model)
    warn_beyond_window(model, max(map(len, samples)), "seal_ops.train")
    lr, column_lr = groups.rates(model, lr, settings.column_lr, "train")
    completed = settings.completed(model, samples, lr, column_lr)
    optimizer = torch.optim.AdamW(
        groups.groups_at(model, lr, column_lr), betas=settings.betas, weight_decay=settings.weight_decay
    )
    order = SampleOrder(samples, settings.epochs, settings.batch_size, settings.accumulate, settings.seed)
    folder = None
    if settings.output_dir is not None:
        folder = RunFolder(settings.output_dir, model, trained, optimizer, processes)
    device, plan = next(iter(trained.values())).device, None

    with processes.alone_in(settings.output_dir, "seal_ops.train"):
        gpus = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus), masks, mode(model, True), contextlib.ExitStack() as running:
            torch.manual_seed(settings.seed)
            processes.begin(trained, completed, samples)
            state = Progress() if folder is None else folder.begin(settings.resume, completed, samples)
            losses = state.losses
            if len(losses) < order.steps:
                planned = PlannedModel(model, samples, settings.batch_size, processes, settings.frozen_linears)
                step = OptimizerStep(planned, trained, optimizer, processes, completed["max_grad_norm"])
                state.linears = convert_and_compare(
                    running, model, settings.frozen_linears, order.micro_batches(0)[0][0],
                    functools.partial(step.gradients, seed=settings.seed), state.linears,
                )  # fmt: skip
                running.enter_context(planned)
                planned.follow(settings.gradient_checkpointing, state.tile, settings.memory)
            memories.begin_peak(device)
            earlier, started = state.seconds, time.monotonic()
            with bar(order.steps, _label(completed), progress if processes.main else False) as update:
                update(len(losses))
                while len(losses) < order.steps:
                    done = len(losses) + 1
                    loss = step.take(order.micro_batches(done - 1), done)
                    losses.append(loss)
                    plan = planned.plan
                    state.seconds, state.tile = earlier + time.monotonic() - started, plan.tile
                    if folder is not None and (done % settings.checkpoint_every == 0 or done == order.steps):
                        folder.save_checkpoint(state)
                    update(1, f"loss {loss:.3f}")
                    if settings.on_step is not None:
                        settings.on_step(done, loss)
        peak = memories.peak(device)
        result = TrainResult(
            losses=losses,
            lr=completed["lr"],
            parameters=sum(p.numel() for p in trained.values()),
            seconds=state.seconds,
            peak_memory=peak,
            settings=completed,
            plan={} if plan is None else {**plan.facts(), "measured_peak": peak},
            frozen_linears=state.linears,
            provenance={} if folder is None else provenance(model),
            model=model,
        )
        if folder is not None:
            folder.save_result({f.name: getattr(result, f.name) for f in fields(result) if f.name != "model"})
        return result


def _label(settings: dict) -> str:
    """What the bar says."""
    kind = "weak columns" if "columns" in settings else "adapter"
    return f"training {NAMES.get(settings['granularity'], kind)}, lr {settings['lr']:g}"
