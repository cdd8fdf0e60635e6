"""Greedy decoding of many prompts at once, on a cache of fixed size in which every row has a position of its own.

Prompts are read in groups, padded on the right: under a causal mask no real token sees the padding, and the first
tokens
that a row generates overwrite it.  All rows then advance together, one token a step.  Since no shape changes from
step to
step, a step can be recorded as a CUDA graph: a small model's step is otherwise some thousand launches from Python.
"""

import contextlib
import warnings
from collections.abc import Callable, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache

from ..huggingface import attention  # noqa: F401 (registers NAME with transformers)
from ..huggingface.context_window import extension_of
from ..huggingface.masks import NAME, PLAIN
from ..huggingface.modes import accepts
from ..utils.memory import free_on_gpu

PREFILL_TOKENS = (8_192, 65_536)  # prompt tokens in one forward pass: on a CPU, on a GPU
CACHE_SHARE = 0.3  # of the GPU's free memory, for keys and values
MOST_ROWS = 256
ROUNDING = 64  # the cache's length is a multiple of this, so that rows of the mask are aligned
# Rotations that depend on the longest sequence of a batch: a row's output would depend on its company.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


def supports(model) -> bool:
    """Whether ``model`` (without a PEFT wrapper) is a plain causal decoder whose layers all see the whole past."""
    config = getattr(model, "config", None)
    extension = extension_of(model)
    if extension is not None and extension.layers:  # their keys are turned when they are read
        return False
    if config is None or not getattr(type(model), "_can_compile_fullgraph", False) or hasattr(model, "hf_device_map"):
        return False
    if getattr(config, "is_encoder_decoder", False) or config.get_text_config() is not config:
        return False
    if not all(accepts(model, name) for name in (_cache_argument(model), "position_ids", "logits_to_keep")):
        return False
    if getattr(config, "_attn_implementation", None) not in ("sdpa", NAME):
        return False
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return False
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("rope_type", "default") not in _LENGTH_DEPENDENT and any(
        name.endswith("rotary_emb") for name, _ in model.named_modules()
    )


def rows_that_fit(model, length: int) -> int:
    """Rows of ``length`` tokens whose keys and values take :data:`CACHE_SHARE` of the GPU's free memory; at least 1."""
    row = cached_numbers(model.config) * model.dtype.itemsize * _rounded(length)
    return max(1, min(MOST_ROWS, int(CACHE_SHARE * free_on_gpu(model.device)) // row))


def cached_numbers(config) -> int:
    """Keys and values of one token in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim


def _rounded(length):
    """The length of the cache that holds ``length`` tokens."""
    return -(-length // ROUNDING) * ROUNDING


def decode(
    model, prompts: Sequence[Sequence[int]], most: int, ended: Callable[[list[int]], bool], *, graph: bool | None = None
) -> None:
    """Feeds ``ended`` the next token of every row, step by step, until it returns True or ``most`` steps are done.

    Args:
        model: one that :func:`supports`.
        prompts: token ids, one list a row.
        ended: takes the tokens of one step, one a row.
        graph: record the step as a CUDA graph; None where the model is on a GPU.
    """
    device = model.device
    graph = device.type == "cuda" if graph is None else graph
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = _FixedCache(len(prompts), _rounded(max(map(len, prompts)) + most))
    step = _Step(model, cache, _read(model, cache, prompts), lengths)
    with _decoding_attention(model):
        replay = None
        for count in range(most):
            if ended(step.tokens.flatten().tolist()) or count + 1 == most:
                return
            # The first step runs as it is: it shows that one runs at all, and lets libraries set themselves up.
            if graph and count == 1:
                replay, graph = step.record(), False
            (replay or step)()


class _FixedCache(Cache):
    """Keys and values of all rows ``[rows, Hkv, size, D]`` a layer, made when a layer first brings some."""

    is_compileable = False  # transformers then leaves the mask of a prompt to be no tensor

    def __init__(self, rows, size):
        super().__init__(layers=[])
        self.rows, self.size = rows, size
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.part: slice | None = None  # while prompts are read: the rows that they are
        self.places: torch.Tensor | None = None  # afterwards: where each row's next token goes, [rows]

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        given = (key_states, value_states)
        if layer_idx not in self.kept:  # zeros: what is masked must be finite
            self.kept[layer_idx] = tuple(t.new_zeros(self.rows, t.shape[1], self.size, t.shape[3]) for t in given)
        kept = self.kept[layer_idx]
        if self.part is not None:
            for whole, new in zip(kept, given, strict=True):
                whole[self.part, :, : new.shape[2]] = new
            return given
        for whole, new in zip(kept, given, strict=True):
            whole.scatter_(2, self.places[:, None, None, None].expand_as(new), new)
        return kept

    def get_seq_length(self, layer_idx=0):
        return 0  # positions are given with every step

    def get_mask_sizes(self, query_length, layer_idx=0):
        return query_length, 0


class _Step:
    """One token for every row; ``tokens`` [rows, 1] are the latest, and ``places`` [rows] where they belong."""

    def __init__(self, model, cache, tokens, places):
        self.model, self.cache, self.tokens, self.places = model, cache, tokens, places
        cache.places = places
        self.columns = torch.arange(cache.size, device=tokens.device)
        dtype = model.dtype
        self.seen = torch.zeros((), dtype=dtype, device=tokens.device)
        self.hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=tokens.device)

    def __call__(self):
        mask = torch.where(self.columns <= self.places[:, None], self.seen, self.hidden)[:, None, None]
        logits = _forward(
            self.model, self.cache, self.tokens, 1, attention_mask=mask, position_ids=self.places[:, None]
        )
        self.tokens.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.places.add_(1)

    def record(self):
        """The step as a CUDA graph to be replayed; None, with a warning, where it cannot be recorded."""
        recorded = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(recorded):
                self()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"generate: decoding without a CUDA graph, several times slower: {reason}", stacklevel=2)
            return None
        return recorded.replay


def _read(model, cache, prompts):
    """Reads all prompts into the cache; the first token of every row, [rows, 1]."""
    lengths = [len(prompt) for prompt in prompts]
    rows = max(1, PREFILL_TOKENS[model.device.type == "cuda"] // max(lengths))
    first = []
    for start in range(0, len(prompts), rows):
        part = lengths[start : start + rows]
        longest = max(part)
        ids = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts[start : start + rows]]
        last = sorted({length - 1 for length in part})
        cache.part = slice(start, start + len(part))
        ids, keep = (torch.tensor(x, device=model.device) for x in (ids, last))
        logits = _forward(model, cache, ids, keep)
        of_row = torch.tensor([last.index(length - 1) for length in part], device=model.device)
        first.append(logits[torch.arange(len(part), device=model.device), of_row].argmax(-1, keepdim=True))
    cache.part = None
    return torch.cat(first)


def _forward(model, cache, ids, keep, **options):
    return model(
        input_ids=ids, use_cache=True, logits_to_keep=keep, **{_cache_argument(model): cache}, **options
    ).logits


def _cache_argument(model):
    """Newer releases of transformers call it ``cache``."""
    return "cache" if accepts(model, "cache") else "past_key_values"


@contextlib.contextmanager
def _decoding_attention(model):
    """Attention that reads a group's keys once; transformers' SDPA, given a mask, copies them for every query head."""
    config = model.config
    before = config._attn_implementation
    if before != NAME:  # no scales on it
        config._attn_implementation_internal = PLAIN
    # Not cuDNN's: it plans anew for every shape, which cannot be recorded.
    kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    try:
        with sdpa_kernel(kernels) if model.device.type == "cuda" else contextlib.nullcontext():
            yield
    finally:
        config._attn_implementation_internal = before
