"""The plan: what each decoder layer keeps, so that a step fits into memory and recomputes as little as it can."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ...huggingface.modes import mode, prepared
from ..frozen_linears.conversion import converted_linears
from ..processes import Processes
from . import memory as memories
from .decoder import UnknownStructure, device_of, find_decoder
from .execution import ATTENTION, EVERYTHING, INPUT, OFFLOADED, Execution, Whole, use_rows
from .measuring import Measurement, WholeMeasurement
from .short_samples import ShortSamples
from .simulation import expected, seconds
from .tiling import TILE

SETTINGS = {False: EVERYTHING, "selective": ATTENTION, True: INPUT}  # of `train`, for all layers alike
_MEANING = {
    EVERYTHING: "everything that its backward pass reads",
    ATTENTION: "its input and the attention's results; the rest is recomputed",
    INPUT: "its input; all of it is recomputed",
    OFFLOADED: "its input, in the host's pinned memory",
}


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """What each decoder layer keeps for the backward pass, and what that is expected to take.

    Attributes:
        length, batch_size, labels: tokens of a row, rows of a forward pass, and rows whose logits the loss reads.
        processes: how many divide the tokens of a row among themselves; what follows is of each.
        keeps: for each layer "everything", "attention" (its input and the fused attention's output, log-sum-exp and
            rotated queries and keys), "input", or "offloaded" (the input, in pinned host memory).
        group: layers under one checkpoint, of whose inputs the first is kept.
        tile: tokens, of all rows together, that MLPs and norms treat at once; None for all.
        cuts_last_layer: whether behind the last attention only rows that the loss reads are computed.
        memory: bytes that the step was allowed.
        used: bytes in use on the device when the plan was made.
        expected: bytes that the step is expected to take beside them, at most at once.
        kept: bytes of them that the layers keep at the end of the forward pass.
        host: bytes of pinned host memory.
        fits: whether the expectation lies within ``memory``.
        seconds: of forward and backward; None where the device's throughput was not measured.
        notes: what the plan leaves out, and why; and what it does not know.
    """

    length: int
    batch_size: int
    labels: int
    keeps: tuple[str, ...]
    group: int = 1
    tile: int | None = None
    cuts_last_layer: bool = False
    memory: int = 0
    used: int = 0
    expected: int = 0
    kept: int = 0
    host: int = 0
    fits: bool = True
    seconds: float | None = None
    notes: tuple[str, ...] = ()
    processes: int = 1

    @property
    def peak(self) -> int:
        """Bytes in use at most, with what was in use before."""
        return self.used + self.expected

    def summary(self) -> str:
        """One line: how many layers keep what."""
        parts = [f"{count} x {what}" for what, count in Counter(self.keeps).items()]
        parts += [f"groups of {self.group}"] * (self.group > 1) + [f"tiles of {self.tile} tokens"] * bool(self.tile)
        return ", ".join(parts)

    def facts(self) -> dict:
        """What `training.json` holds of it."""
        return {
            "layers": {what: count for what, count in Counter(self.keeps).items()},
            "group": self.group,
            "tile": self.tile,
            "cuts_last_layer": self.cuts_last_layer,
            "expected_peak": self.peak,
            "host": self.host,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = f"{self.batch_size} x {self.length} tokens" if self.batch_size > 1 else f"{self.length} tokens"
        rows += f" divided among {self.processes} processes" if self.processes > 1 else ""
        lines = [f"plan of a training step: {rows}, {len(self.keeps)} layers, logits at {self.labels} positions"]
        number = 0
        for what, run in itertools.groupby(self.keeps):
            count = len(list(run))
            lines.append(f"  layers {f'{number}-{number + count - 1}':>7}  keep {what:<10}  ({_MEANING[what]})")
            number += count
        if self.group > 1:
            lines.append(f"  groups          {self.group} layers under one checkpoint, of which one input is kept")
        if self.tile:
            lines.append(f"  tiles           MLPs and norms, {self.tile} tokens at once")
        if self.cuts_last_layer:
            lines.append("  last layer      behind attention only the rows that the loss reads")
        lines.append(
            f"  peak            {_size(self.peak)}: {_size(self.used)} in use, {_size(self.expected)} for the step "
            f"({_size(self.kept)} kept by the layers), {_size(self.memory)} allowed"
        )
        if self.host:
            lines.append(f"  host            {_size(self.host)} of pinned memory")
        if not self.fits:
            lines.append("  does not fit    the step is expected to run out of memory")
        known = "not known" if self.seconds is None else f"{self.seconds:.3g}, by operations and measured throughput"
        lines.append(f"  seconds         {known}")
        return "\n".join(lines + [f"  note            {note}" for note in self.notes])

    __repr__ = __str__


def plan(
    model: nn.Module,
    length: int,
    batch_size: int = 1,
    memory: int | None = None,
    *,
    labels: int = 512,
    frozen_linears: str | None = None,
) -> Plan:
    """What a training step of ``model`` would keep in memory, layer by layer, and what it is expected to take.

    The sizes are measured: short samples run through the model as it is, forward and backward, on its device.  Where
    processes meet in its forward pass (sequence or tensor parallelism) all must call, and get the same plan.

    Args:
        model: a causal language model of which something requires a gradient.
        length: tokens of a row.
        batch_size: rows of a forward pass.
        memory: bytes that the step may take beside what is in use; None for what is free on the device, less a reserve
            of 8 %.
        labels: positions of a row whose logits the loss reads.
        frozen_linears: "fp8" for the plan of a run with it; the layers are converted for as long as that is measured.

    Returns:
        A :class:`Plan`, which prints as a table.

    Raises:
        ValueError: a size that is not positive, a model of which nothing is trained, or one that cannot be converted.
    """
    for name, value in {"length": length, "batch_size": batch_size, "labels": labels, "memory": memory}.items():
        if value is not None and value < 1:
            raise ValueError(f"seal_ops.plan: {name} must be at least 1, got {value}")
    memories.host_memory()  # what the user says of it is checked first
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("seal_ops.plan: model must have something to train, got no parameter that requires a gradient")
    with mode(model, True), converted_linears(model, frozen_linears, "seal_ops.plan"):
        processes = Processes.of_forward(model)
        planner = Planner(
            model, length, min(labels, length), batch_size, processes=processes, frozen_linears=frozen_linears
        )
        return planner.plan(memory)


class Planner:
    """Plans for one model and one size of step, and runs them.

    Args:
        model: in training mode, inside whatever a training run puts on it.
        length, labels, batch_size: as in :func:`plan`.
        padded: whether the rows of a batch differ in length.
        ids: tokens of a sample, for the short ones that are measured; None for any.
        processes: of the run: the least of what they have free counts.  Those that meet in a forward pass must make
            and ask their planners together; they measure together, count the most that one has measured, and run one
            plan, since with others they would wait for each other in vain.
        frozen_linears: in what the frozen linear layers multiply whenever something is measured; None for as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        length: int,
        labels: int,
        batch_size: int = 1,
        padded: bool = False,
        ids: Sequence[int] | None = None,
        processes: Processes | None = None,
        frozen_linears: str | None = None,
    ):
        self.frozen_linears = frozen_linears
        self.processes = Processes() if processes is None else processes
        self.model, self.length, self.labels, self.batch_size = model, length, labels, batch_size
        self.device = device_of(model)
        self.trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        self.measurement: Measurement | None = None
        self.reason: str | None = None  # why the layers are not planned one by one
        devices = {p.device for p in model.parameters() if not p.is_meta}
        self.plans = len(devices) <= 1
        parts = self.processes.parts
        share = -(-length // parts)  # all labels may lie in one process
        self._samples = ShortSamples(
            model, share, min(labels, share), batch_size, padded and parts == 1, ids, self.processes
        )
        try:
            if _checkpoints(model):
                raise UnknownStructure("its own gradient checkpointing is on, which is left alone")
            if len(devices) > 1:
                raise UnknownStructure(f"it lies on {len(devices)} devices")
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                self.measurement = Measurement(self._samples, find_decoder(model))
        except UnknownStructure as reason:
            self.reason = str(reason)
        except Exception as error:  # a model that does not take short samples trains all the same
            self.reason = self._failure(error)
        self.reason = next((reason for reason in self.processes.met(self.reason) if reason is not None), None)
        if self.reason is not None:
            self.measurement = None
        else:
            self.measurement.agree()

    def _failure(self, error: Exception) -> str:
        """The end of a sentence after "because".  Where memory has ended in one of the processes that wait for each
        other, it must not go on alone."""
        if self.processes.meet_in_forward and isinstance(error, torch.OutOfMemoryError):
            raise error
        first = (str(error).strip() or "?").splitlines()[0]
        return f"measuring it failed ({type(error).__name__}: {first[:240]})"

    # -------------------------------------------------------------------------------------------------- choosing

    def uniform(self, setting: bool | str, tile: int | None | bool = True) -> Plan:
        """All layers alike, as `train`'s ``gradient_checkpointing`` says; nothing is measured."""
        tile = None if tile is True else tile
        return self._plan((SETTINGS[setting],) * self._count(), tile=tile, notes=self._notes())

    def plan(self, memory: int | None = None, tile: int | None | bool = True) -> Plan:
        """The plan that recomputes least within ``memory`` bytes (None: what is free).

        ``tile``: True leaves it to the plan whether there are tiles; None or a number of tokens decides it.
        """
        used = memories.used(self.device)
        if memory is None:
            memory = self.processes.least(round(memories.free(self.device) * (1 - memories.RESERVE)))
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            try:
                found = self._whole(memory, used) if self.measurement is None else self._each(memory, used, tile)
            except Exception as error:
                notes = (*self._notes(), f"nothing is planned, because {self._failure(error)}")
                tile = tile if type(tile) is int else None
                found = self._plan((EVERYTHING,) * self._count(), memory=memory, used=used, tile=tile, notes=notes)
        if len({(plan.keeps, plan.group, plan.tile) for plan in self.processes.met(found)}) > 1:
            raise RuntimeError(
                f"seal_ops: processes that meet in a forward pass must run one plan, got {found.summary()} here and "
                f"another one elsewhere: {'; '.join(found.notes)}"
            )
        return found

    def _each(self, allowed: int, used: int, tile: int | None | bool) -> Plan:
        """For a model whose layers are known."""
        keeps, group, tile, found, fits, refused = self._choose(allowed, tile)
        speed, known = self._throughput(), None
        if not isinstance(speed, str):
            known = seconds(self.measurement.costs(tile), keeps, group, tile is not None, speed)
        notes = self._notes()
        notes += (f"the seconds are not known: {speed}",) if known is None else ()
        if refused is not None:
            needed, host = refused
            notes += (
                f"a way that recomputes less was passed over for the host's memory: its inputs would take "
                f"{_size(needed)} there, of {_size(host.bytes)} available ({host.source}); "
                f"{memories.HOST_MEMORY}=GIB says otherwise, as where memory grows with use",
            )
        return self._plan(
            keeps, group=group, tile=tile, memory=allowed, used=used, expected=found.peak, kept=found.kept,
            host=found.host, fits=fits, seconds=known, notes=notes,
        )  # fmt: skip

    def _plan(self, keeps: tuple[str, ...], **rest) -> Plan:
        samples, rows = self._samples, None if self.measurement is None else self.measurement.rows
        cuts = use_rows(rows, samples.labels, samples.length)
        processes = self.processes.parts
        return Plan(self.length, self.batch_size, self.labels, keeps, cuts_last_layer=cuts, processes=processes, **rest)

    def _count(self) -> int:
        return len(self.measurement.decoder.layers) if self.measurement else 1

    def _notes(self) -> tuple[str, ...]:
        if self.measurement is None:
            return (f"all layers are treated alike, because {self.reason}",)
        reason = self.measurement.rows_reason
        return () if reason is None else (f"all rows of the last layer are computed, because {reason}",)

    def _throughput(self):
        dtype = next(p.dtype for p in self.model.parameters() if p.dim() > 1)
        if getattr(self.model.config, "quantization_config", None) is not None:
            return "none was measured of quantised products"
        if self.frozen_linears is not None:
            return f"none was measured of products in {self.frozen_linears}"
        return memories.throughput_of(self.device, dtype)

    def _choose(self, allowed: int, tile: int | None | bool):
        """``(keeps, group, tile, expected, fits, refused)``: the first that fits of ways that recompute more and more.

        ``refused``: bytes that a way before it would have pinned on the host, where that was all that was missing, and
        the host's memory; or None.
        """
        count, least, refused = self._count(), None, None
        if tile is True:
            keeps = (EVERYTHING,) * count
            found = expected(self.measurement.costs(None, plain=True), keeps, 1, self.trained)
            if found.peak <= allowed:
                return keeps, 1, None, found, True, None
        host = min(self.processes.met(memories.host_share()), key=lambda share: share.bytes)
        for low, high, group, tiles in self._candidates(tile):
            costs = self.measurement.costs(tiles)
            # The last layers keep more: what they hold is gone first.
            for number in range(count, -1, -1) if low != high else (0,):
                keeps = (low,) * (count - number) + (high,) * number
                keeps = tuple(INPUT if k == ATTENTION and not c.attention else k for k, c in zip(keeps, costs.layers))
                found = expected(costs, keeps, group, self.trained)
                if found.peak <= allowed and found.host <= host.bytes:
                    return keeps, group, tiles, found, True, refused
                if found.peak <= allowed and refused is None:
                    refused = found.host, host
                if found.host <= host.bytes and (least is None or found.peak < least[3].peak):
                    least = keeps, group, tiles, found, False
        return *least, refused

    def _candidates(self, tile: int | None | bool) -> Iterator[tuple[str, str, int, int | None]]:
        if tile is True:
            many = self._samples.length * self.batch_size > TILE
            tiles = (None, TILE) if many and self.measurement.tiled else (None,)
        else:
            tiles = (tile,)
        for low, high in ((ATTENTION, EVERYTHING), (INPUT, ATTENTION)):
            yield from ((low, high, 1, t) for t in tiles)
        offload = self.device.type == "cuda"
        if offload:
            yield OFFLOADED, INPUT, 1, tiles[-1]
        for group in range(2, self._count() + 1):
            yield INPUT, INPUT, group, tiles[-1]
            if offload:
                yield OFFLOADED, OFFLOADED, group, tiles[-1]

    def _whole(self, allowed: int, used: int) -> Plan:
        """For a model whose layers are not known: the first setting of all layers that fits."""
        if not self.plans:
            return self._plan((EVERYTHING,), memory=allowed, used=used, notes=(*self._notes(), "nothing is planned"))
        settings = [False, "selective", True] if self._can_checkpoint() else [False]
        measurement = WholeMeasurement(self._samples)
        for setting in settings:
            found = max(self.processes.met(measurement.peak(setting))) + 3 * self.trained
            if found <= allowed:
                break
        notes = (*self._notes(), f"the seconds are not known: {self._throughput()}")
        return self._plan(
            (SETTINGS[setting],), memory=allowed, used=used, expected=found, fits=found <= allowed, notes=notes
        )

    def _can_checkpoint(self) -> bool:
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return not _checkpoints(self.model) and bool(getattr(base, "supports_gradient_checkpointing", False))

    # --------------------------------------------------------------------------------------------------- running

    @contextlib.contextmanager
    def running(self, plan: Plan) -> Iterator[Execution | Whole]:
        """Inside, the model runs as ``plan`` says."""
        if self.measurement is None:
            setting = next(s for s, what in SETTINGS.items() if what == plan.keeps[0])
            with prepared(self.model, setting):
                yield Whole()
            return
        found = self.measurement
        execution = Execution(found.decoder, plan.keeps, plan.group, plan.tile, found.tiled, found.rows)
        with execution.on():
            yield execution

    def lower(self, plan: Plan) -> Plan | None:
        """A plan that takes less than one that did not fit; None where there is none."""
        found = self.plan(round(min(plan.memory, plan.expected) * 0.85), True if plan.tile is None else plan.tile)
        return found if found.expected < plan.expected else None


def _checkpoints(model: nn.Module) -> bool:
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    return bool(getattr(model, f"is_{word}_checkpointing", False))


def _size(count: int) -> str:
    """Bytes in GiB, or in MiB where that is little."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
