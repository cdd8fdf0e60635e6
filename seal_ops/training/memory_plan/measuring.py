"""What a decoder costs by length: bytes kept, bytes alive at most and operations, measured on a few short samples."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...huggingface.logits import logits_at
from ...huggingface.modes import prepared
from ..losses import summed_cross_entropy
from .costs import Costs, LayerCost, largest
from .decoder import Decoder, UnknownStructure, Watch, replaced_forwards
from .execution import EVERYTHING, Execution, at_rows
from .last_rows import LastRows, cut_last_layer
from .live_bytes import Meter, Saved
from .short_samples import Growth, ShortSamples
from .tiling import candidates, run_tiled, treats_tokens_alone

_GROWING = [f.name for f in dataclasses.fields(LayerCost)][2:]


class Measurement:
    """Measures the layers of a decoder one by one on ``samples``.

    Raises:
        UnknownStructure: the layers are no chain.

    ``rows``: the last layer where it can be cut, else ``rows_reason`` says why not.  ``tiled``: what can run in tiles.
    """

    def __init__(self, samples: ShortSamples, decoder: Decoder):
        self.samples, self.decoder = samples, decoder
        self.model, self.device = samples.model, samples.device
        self.rows: LastRows | None = None
        self.rows_reason: str | None = None
        self.tiled: tuple[nn.Module, ...] = ()
        self._taken: dict[tuple[int | None, bool], list[_Sample]] = {}
        self._costs: dict[tuple[int | None, bool], Costs] = {}
        self._tile_bytes = 0.0  # of a tile, for each of its tokens
        self._look()

    def costs(self, tile: int | None, plain: bool = False) -> Costs:
        """The costs at the length, with what can run in tiles of ``tile`` tokens; None for whole modules.

        ``plain``: only those of layers that keep everything, which takes half the time.  Processes that meet in a
        forward pass must ask together, and get the same.
        """
        if (tile, plain) not in self._costs:
            self._costs[tile, plain] = largest(self.samples.processes.met(self._measured(tile, plain)))
        return self._costs[tile, plain]

    def agree(self) -> None:
        """Leaves out of the tiles, and of the last layer, what one of the processes that meet has found wanting."""
        names = {id(module): name for name, module in self.decoder.model.named_modules()}
        reasons, tiled = zip(*self.samples.processes.met((self.rows_reason, {names[id(m)] for m in self.tiled})))
        self.rows_reason = next((reason for reason in reasons if reason is not None), None)
        self.rows = self.rows if self.rows_reason is None else None
        self.tiled = tuple(m for m in self.tiled if names[id(m)] in set.intersection(*tiled))

    def _measured(self, tile: int | None, plain: bool) -> Costs:
        alike = tile is None or self.samples.alike(tile)
        if not alike and not self._tile_bytes:
            with _no_garbage():
                self._measure_tiles()
        if (tile, plain) not in self._taken:
            with _no_garbage():
                if not self._taken:
                    # A process's first products make the libraries' workspaces, in the backward pass's thread its own.
                    self._sample(*self.samples.points[0], None, False)
                self._taken[tile, plain] = [self._sample(n, k, tile, plain) for n, k in self.samples.points]
        samples, fit = self._taken[tile, plain], self.samples.fit
        # Where the samples' tiles are short, a real one takes so much more, at most.
        more = 0 if alike else self._tile_bytes * (tile - self.samples.tile_of(tile, self.samples.shortest))
        layers = []
        for found in zip(*(s.layers for s in samples)):
            # What is kept is a sum: where it has no square, the bends of what is a maximum are none.
            straight = found[0].differentiates and not self._bends([cost.kept for cost in found])
            values = {name: fit([getattr(cost, name) for cost in found], straight) for name in _GROWING}
            for name in ("free", "forward", "backward"):
                values[name] += more
            layers.append(dataclasses.replace(found[0], **values))
        whole = {name: fit([getattr(s, name) for s in samples]) for name in ("before", "head_operations")}
        # Norm, logits and loss treat each row by itself.  Only masks that die meanwhile bend the head, and they are in
        # `before`.  What its rows with labels take is set aside, and of the small rest any noise would be a square.
        whole["head"] = fit([s.head for s in samples], not self._bends([s.before for s in samples]))
        return Costs(tuple(layers), **whole)

    def _bends(self, values: Sequence[float]) -> bool:
        return Growth.through(self.samples.points, values).square != 0

    # ------------------------------------------------------------------------------------------------- structure

    def _look(self) -> None:
        watch, alone = Watch(self.decoder), {}
        try:
            self.rows = cut_last_layer(self.decoder)
        except UnknownStructure as reason:
            self.rows_reason = str(reason)

        def layer(number, forward, *args, **kwargs):
            states = watch.enter(number, args, kwargs)
            if number == len(self.decoder.layers) - 1 and self.rows is not None:
                try:
                    self.rows.check(
                        forward, states, torch.arange(1, states.shape[1], 3, device=states.device), *args[1:], **kwargs
                    )
                except UnknownStructure as reason:
                    self.rows, self.rows_reason = None, str(reason)
            result = forward(*args, **kwargs)
            watch.leave(states, result)
            return result

        def child(module, forward, *args, **kwargs):
            result = forward(*args, **kwargs)
            if treats_tokens_alone(forward, args, kwargs, result):
                alone[id(module)] = module
            return result

        changes = [(module, _with(layer, n)) for n, module in enumerate(self.decoder.layers)]
        changes += [(module, _with(child, module)) for module in candidates(self.decoder)]
        with replaced_forwards(changes), torch.no_grad():
            self.model(**self.samples.inputs(self.samples.shortest))
        watch.finish()
        self.tiled = tuple(alone.values())

    # --------------------------------------------------------------------------------------------------- samples

    def _sample(self, length: int, labels: int, tile: int | None, plain: bool) -> _Sample:
        found, known, trains = _Sample(), {}, self.decoder.trains
        final = len(trains) - 1
        execution = Execution(self.decoder, (EVERYTHING,) * len(trains), rows=self.rows)
        entry, end, flows, last = Meter(self.device), Meter(self.device, not plain), False, None

        def layer(number, forward, *args, **kwargs):
            nonlocal flows, last
            states = args[0]
            if number == 0:
                found.before, flows = entry.now(), states.requires_grad
                entry.stop()
            flows = flows or trains[number]
            if number == final and self.rows is not None and self.rows.positions is not None:
                forward = at_rows(self.rows, self.rows.positions, forward)
            # Layers of one kind cost the same; one of each is measured.
            kind = self._kind(number, flows, states.requires_grad)
            if kind in known:
                with torch.no_grad():
                    result = forward(*args, **kwargs)
            else:
                known[kind], result = self._layer(number, flows, forward, args, kwargs, plain)
            found.layers.append(known[kind])
            result = result.detach().requires_grad_(flows)
            if number == final:
                last = result
                end.start()
            return result

        changes = [(module, _with(layer, n)) for n, module in enumerate(self.decoder.layers)]
        if tile is not None:
            changes += [(m, _with(run_tiled, m, self.samples.tile_of(tile, length))) for m in self.tiled]
        positions = torch.arange(length - labels, length, device="cpu")
        with replaced_forwards(changes), torch.enable_grad(), contextlib.ExitStack() as meters:
            meters.enter_context(self.samples.launched(length))
            meters.callback(entry.stop)  # where the model fails
            meters.callback(end.stop)
            entry.start()
            logits = execution.logits_at(self.model, positions, **self.samples.inputs(length))
            found.head_operations = end.counted.linear_operations
            loss = _loss(logits)
            del logits
            if loss.requires_grad:
                leaves = [p for p in self.model.parameters() if p.requires_grad]
                torch.autograd.grad(loss, leaves + [last] * last.requires_grad, allow_unused=True)
            found.head = end.lap()
        return found

    def _layer(self, number, flows: bool, forward: Callable, args: tuple, kwargs: dict, plain: bool):
        """``(cost, result)`` of one layer."""
        cost, result = dict.fromkeys(_GROWING, 0) | dict(differentiates=flows, keeps_entry=False), None
        cost["entry"] = _size(args[0]) if number else 0
        if not (plain and flows):
            with Meter(self.device, not plain) as meter, torch.no_grad():
                result = forward(*args, **kwargs)
                cost["free"] = cost["forward"] = meter.lap()
                for name in ("attention", "linear_operations", "attention_operations"):
                    cost[name] = getattr(meter.counted, name)
        if flows:
            found, result = self._differentiated(number, forward, args, kwargs)
            cost |= found
        cost["result"] = _size(result)
        return LayerCost(**cost), result

    def _differentiated(self, number: int, forward: Callable, args: tuple, kwargs: dict) -> tuple[dict, Tensor]:
        states = args[0].detach().requires_grad_(args[0].requires_grad)
        leaves = [p for p in self._parameters(number) if p.requires_grad] + [states] * states.requires_grad
        given = [*self.decoder.model.parameters(), *self.decoder.model.buffers(), *_tensors((args, kwargs))]
        with Meter(self.device) as meter, torch.enable_grad():
            with Saved(given) as saved:
                result = forward(states, *args[1:], **kwargs)
            most, kept, keeps_entry = meter.lap(), saved.bytes, saved.met(states)
            if not result.requires_grad:
                return dict(forward=most), result
            edge, gradient = torch.autograd.graph.get_gradient_edge(result), torch.ones_like(result)
            result = result.detach()
            meter.lap()
            torch.autograd.grad([edge], leaves, [gradient], allow_unused=True)
            # Neither the result nor its gradient belongs to the backward pass of this layer.
            backward = max(0, meter.lap() - 2 * _size(result))
        return dict(kept=kept, keeps_entry=keeps_entry, forward=most, backward=backward), result

    def _measure_tiles(self) -> None:
        """By two tiles: what does not grow, like gradients and a quantised weight written out, is in the samples."""
        seen = set()

        def most(module, forward, piece):
            with Meter(self.device) as meter, torch.enable_grad():
                out = forward(piece)
                leaves = [piece, *(p for p in module.parameters() if p.requires_grad)]
                torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
                return meter.lap()

        def child(module, forward, states):
            kind = (type(module), tuple((n, p.shape, p.requires_grad) for n, p in module.named_parameters()))
            if kind not in seen:
                seen.add(kind)
                rows = states.flatten(0, 1)[None]
                long, short = rows.shape[1], max(1, rows.shape[1] // 2)
                found = [most(module, forward, rows[:, :n].detach().requires_grad_()) for n in (long, short)]
                self._tile_bytes = max(self._tile_bytes, (found[0] - found[1]) / (long - short))
            return forward(states)

        with replaced_forwards([(m, _with(child, m)) for m in self.tiled]), torch.no_grad():
            self.model(**self.samples.inputs(self.samples.shortest))

    def _parameters(self, number: int) -> list[nn.Parameter]:
        attention = self.decoder.attention[number]
        scaling = [] if attention is None or attention.scaling is None else list(attention.scaling.parameters())
        return [*self.decoder.layers[number].parameters(), *scaling]

    def _kind(self, number: int, flows: bool, flows_in: bool) -> tuple:
        layer, attention = self.decoder.layers[number], self.decoder.attention[number]
        config = self.decoder.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or [None] * len(self.decoder.layers)
        names = tuple(name for name, _ in layer.named_parameters())
        shapes = tuple((tuple(p.shape), p.dtype, p.requires_grad) for p in self._parameters(number))
        runs = attention and (
            attention.composed, attention.windowed, type(attention.program), repr(attention.training_mask)
        )  # fmt: skip
        ends = number == 0, number == len(self.decoder.layers) - 1
        kind = kinds[number] if number < len(kinds) else None
        return type(layer), names, shapes, kind, runs, flows, flows_in, ends


class WholeMeasurement:
    """Measures steps of a model whose layers are not known."""

    def __init__(self, samples: ShortSamples):
        self.samples = samples

    def peak(self, setting: bool | str) -> int:
        """Bytes of a forward and backward pass, at most at once, with transformers' own checkpointing as ``setting``
        says."""
        return self.samples.fit([self._peak(setting, n, k) for n, k in self.samples.points])

    def _peak(self, setting: bool | str, length: int, labels: int) -> int:
        model, device = self.samples.model, self.samples.device
        with self.samples.launched(length), prepared(model, setting), Meter(device) as meter, torch.enable_grad():
            positions = torch.arange(length - labels, length, device="cpu")
            loss = _loss(logits_at(model, positions, **self.samples.inputs(length)))
            leaves = [p for p in model.parameters() if p.requires_grad]
            torch.autograd.grad(loss, leaves, allow_unused=True)
            return meter.lap()


def _loss(logits: Tensor) -> Tensor:
    targets = torch.zeros(logits.shape[:2].numel(), dtype=torch.long, device=logits.device)
    return summed_cross_entropy(logits.flatten(0, 1), targets)


@dataclasses.dataclass
class _Sample:
    """What one sample has shown."""

    layers: list[LayerCost] = dataclasses.field(default_factory=list)
    before: int = 0
    head: int = 0
    head_operations: int = 0


@contextlib.contextmanager
def _no_garbage():
    """What an earlier model left in reference cycles is freed before, not in the middle of a sample, whose bytes would
    be fewer by it: what a GPU's allocator counts is of the whole process."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _with(function: Callable, *given) -> Callable:
    return lambda forward, *args, **kwargs: function(*given, forward, *args, **kwargs)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(values) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]
