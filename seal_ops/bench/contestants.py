"""Who takes part: for every operation, how each contestant computes it from the same tensors.

Operations: `attention` (ours with the channel scale and its gradient, peers without any), `rope_attention` (rotation,
attention, scale), `rope` (rotation of q and k alone), `attention_o_proj` (attention, scale, output projection),
`decode` (attention of one query over a cache, no gradient).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from ..ops.dispatch import why_not as why_not_backend
from ..ops.functional import attention, rope, rope_attention
from ..ops.rotary_tables import rope_frequencies, rope_tables
from . import peers
from .shapes import Shape

OPERATIONS = ("attention", "rope_attention", "rope", "attention_o_proj", "decode")
FORWARD_ONLY = ("rope", "decode")  # counted in bytes


class Problem:
    """The tensors of one shape: normal q, k, v and incoming gradient, rotary tables, a scale around 1, an output
    projection."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0):
        g = shape.geometry
        self.shape, self.dtype, self.device = shape, dtype, device
        generator = torch.Generator(device).manual_seed(seed)
        normal = functools.partial(torch.randn, generator=generator, device=device)
        tokens = (shape.batch, shape.seqlen)
        self.q = normal(*tokens, g.heads, g.head_dim, dtype=dtype).requires_grad_()
        self.k = normal(*tokens, g.kv_heads, g.head_dim, dtype=dtype).requires_grad_()
        self.v = normal(*tokens, g.kv_heads, g.head_dim, dtype=dtype).requires_grad_()
        self.grad_out = normal(*tokens, g.heads, g.head_dim, dtype=dtype)
        self.scale = (1 + 0.1 * normal(g.heads, g.head_dim)).requires_grad_()
        self.cos, self.sin = rope_tables(
            shape.seqlen, rope_frequencies(g.head_dim, base=g.rope_theta)[0], device=device
        )
        channels = g.heads * g.head_dim
        self.weight = normal(channels, channels, dtype=dtype) * channels**-0.5  # of o_proj

    @functools.cached_property
    def hf_angles(self) -> tuple[Tensor, Tensor]:
        """cos and sin as Hugging Face's rotary module hands them out: [1, S, D] in the model's dtype."""
        return tuple(torch.cat((t, t), -1)[None].to(self.dtype) for t in (self.cos, self.sin))

    @functools.cached_property
    def low_scale(self) -> Tensor:
        """The scale as a parameter in the model's dtype: what costs the hand-written path least."""
        return self.scale.detach().to(self.dtype).requires_grad_()


class DecodeProblem:
    """One query a row over a cache of shape.seqlen keys, as Hugging Face lays it out: [B, Hkv, S, D], seen as [B, S,
    Hkv, D]."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0):
        g = shape.geometry
        self.shape, self.dtype, self.device = shape, dtype, device
        normal = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(seed), device=device)
        self.q = normal(shape.batch, 1, g.heads, g.head_dim, dtype=dtype)
        self.k, self.v = (
            normal(shape.batch, g.kv_heads, shape.seqlen, g.head_dim, dtype=dtype).transpose(1, 2) for _ in range(2)
        )
        self.scale = 1 + 0.1 * normal(g.heads, g.head_dim)


@dataclasses.dataclass
class Run:
    """One contestant at work: `forward()` gives the result, whose gradients are taken with respect to `inputs`."""

    forward: Callable[[], Tensor | tuple[Tensor, Tensor]]
    inputs: tuple[Tensor, ...] = ()  # q, k, v and, if it is scaled, the scale


@dataclasses.dataclass(frozen=True)
class Contestant:
    name: str
    label: str
    operations: tuple[str, ...]
    prepare: Callable[[str, Problem], Run]
    why_not: Callable[[str, Problem], str | None]  # one sentence, or None where it can take part
    scaled: bool = True  # multiplies by the scale in `attention` too, and gives its gradient
    compiled: bool = False  # under torch.compile: seconds of start-up a shape, so these come last
    tolerance: float = 1.0  # times gate.TOLERANCE


def _on(device: str, window: bool = True, mask: bool = False) -> Callable[[str, Problem], str | None]:
    def why_not(operation: str, problem: Problem) -> str | None:
        if problem.device.type != device:
            return f"runs on {device}"
        if problem.shape.mask is not None and not mask:
            return "has no such mask without a mask tensor"
        if problem.shape.geometry.window is not None and not window:
            return "has no sliding window without a mask tensor"
        return None

    return why_not


def _seal(backend: str) -> Contestant:
    def why_not(operation: str, problem: Problem) -> str | None:
        if backend == "cpu" and problem.device.type != "cpu":
            return "runs on cpu"
        for op in {"attention_o_proj": ("attention", "attention_backward"), "decode": ("attention",)}.get(
            operation, (operation,)
        ):
            reason = why_not_backend(backend, op, problem.device, problem.dtype, problem.shape.geometry.head_dim)
            if reason is not None:
                return reason
        return None

    def prepare(operation: str, p: Problem) -> Run:
        options = dict(backend=backend, window=p.shape.geometry.window, mask=p.shape.mask)
        inputs = (p.q, p.k, p.v, p.scale)
        if operation in ("attention", "decode"):
            return Run(lambda: attention(p.q, p.k, p.v, p.scale, **options), inputs)
        if operation == "rope_attention":
            return Run(lambda: rope_attention(p.q, p.k, p.v, p.cos, p.sin, scale=p.scale, **options), inputs)
        if operation == "rope":
            q, k = p.q.detach(), p.k.detach()
            return Run(lambda: rope(q, k, p.cos, p.sin, backend=backend))
        return Run(lambda: attention(p.q, p.k, p.v, p.scale, **options).flatten(2) @ p.weight.T, inputs)

    return Contestant(f"seal-{backend}", f"seal_ops ({backend})", OPERATIONS, prepare, why_not)


def _plain(
    name: str, label: str, attention: Callable[[Problem], peers.Attention], why_not, compiled: bool = False
) -> Contestant:
    """A peer's attention alone: no rotation, no scale."""

    def prepare(operation: str, p: Problem) -> Run:
        run = attention(p)
        return Run(lambda: run(p.q, p.k, p.v), (p.q, p.k, p.v))

    return Contestant(name, label, ("attention",), prepare, why_not, scaled=False, compiled=compiled)


def _decoder(name: str, label: str, attention: Callable[[DecodeProblem], peers.Attention], why_not) -> Contestant:
    """A peer's attention of one query, without any scale."""

    def prepare(operation: str, p: DecodeProblem) -> Run:
        run = attention(p)
        return Run(lambda: run(p.q, p.k, p.v))

    return Contestant(name, label, ("decode",), prepare, why_not, scaled=False)


def _by_hand(
    name: str, label: str, attention: Callable[[Problem], peers.Attention], why_not, compiled: bool = False
) -> Contestant:
    """Hugging Face's rotary, a peer's attention and a multiplication; its rotation rounds cos and sin to the dtype."""

    def prepare(operation: str, p: Problem) -> Run:
        run = peers.hf_by_hand(attention(p))
        run = torch.compile(run, dynamic=False) if compiled else run
        return Run(lambda: run(p.q, p.k, p.v, *p.hf_angles, p.low_scale), (p.q, p.k, p.v, p.low_scale))

    return Contestant(name, label, ("rope_attention",), prepare, why_not, compiled=compiled, tolerance=3.0)


def _scaled(name: str, label: str, attention: Callable[[Problem], peers.Attention], why_not) -> Contestant:
    """A peer's attention, a multiplication by the scale, the projection."""

    def prepare(operation: str, p: Problem) -> Run:
        run = attention(p)
        return Run(lambda: (run(p.q, p.k, p.v) * p.low_scale).flatten(2) @ p.weight.T, (p.q, p.k, p.v, p.low_scale))

    return Contestant(name, label, ("attention_o_proj",), prepare, why_not)


def _rotary(name: str, label: str, compiled: bool) -> Contestant:
    def prepare(operation: str, p: Problem) -> Run:
        q, k = p.q.detach(), p.k.detach()
        run = torch.compile(peers.hf_rotary, dynamic=False) if compiled else peers.hf_rotary
        return Run(lambda: run(q, k, *p.hf_angles))

    return Contestant(name, label, ("rope",), prepare, lambda *_: None, compiled=compiled, tolerance=3.0)


def _ia3(name: str, label: str, backend: SDPBackend | None, why_not) -> Contestant:
    def prepare(operation: str, p: Problem) -> Run:
        attention = peers.sdpa(backend)
        o_proj, vector = peers.peft_ia3(p.weight, p.scale.detach())
        return Run(lambda: o_proj(attention(p.q, p.k, p.v).flatten(2)), (p.q, p.k, p.v, vector))

    return Contestant(name, label, ("attention_o_proj",), prepare, why_not)


def all_contestants(fa3_folder: str | None = None) -> list[Contestant]:
    """Everybody, ours first. FlashAttention-3 is looked for only when a contestant's `why_not` is asked."""
    gpu, gpu_full = _on("cuda"), _on("cuda", window=False)

    @functools.cache
    def fa3_missing() -> str | None:
        return peers.load_fa3(fa3_folder)

    def fa3_why_not(operation: str, problem: Problem) -> str | None:
        return gpu(operation, problem) or fa3_missing()

    @functools.cache
    def fa4_missing() -> str | None:
        return peers.missing_fa4()

    def fa4_why_not(operation: str, problem: Problem) -> str | None:
        return gpu(operation, problem) or fa4_missing()

    def masked(operation: str, problem: Problem) -> str | None:
        there = problem.shape.mask is not None
        return _on("cuda", mask=True)(operation, problem) or (None if there else "runs on masks of their own")

    cudnn, fa2 = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    torch_sdpa = lambda backend: lambda p: peers.sdpa(backend)
    fa3 = lambda p: peers.fa3(p.shape.geometry.window)
    fa4 = lambda p: peers.fa4(p.shape.geometry.window)
    return [
        _seal("cuda"),
        _seal("triton"),
        _seal("cpu"),
        _plain("fa3", "FlashAttention-3", fa3, fa3_why_not),
        _plain("fa4", "FlashAttention-4", fa4, fa4_why_not),
        _plain("sdpa-cudnn", "SDPA cuDNN", torch_sdpa(cudnn), gpu_full),
        _plain("sdpa-fa2", "SDPA FlashAttention-2", torch_sdpa(fa2), gpu_full),
        _plain("sdpa", "SDPA", torch_sdpa(None), _on("cpu", window=False)),
        _plain(
            "flex",
            "FlexAttention",
            lambda p: peers.flex(p.shape.seqlen, p.shape.visibility, p.shape.geometry.heads, p.device),
            _on("cuda", mask=True),
            compiled=True,
        ),
        _plain(
            "flex-mask",
            "FlexAttention, its mask made in the call",
            lambda p: peers.flex(p.shape.seqlen, p.shape.visibility, p.shape.geometry.heads, p.device, fresh=True),
            masked,
            compiled=True,
        ),
        _plain(
            "flex-fa4",
            "FlexAttention on FlashAttention-4",
            lambda p: peers.flex(p.shape.seqlen, p.shape.visibility, p.shape.geometry.heads, p.device, kernel="FLASH"),
            lambda operation, problem: masked(operation, problem) or fa4_missing(),
            compiled=True,
        ),
        _by_hand("hf-fa3", "HF rotary + FlashAttention-3 + scale", fa3, fa3_why_not),
        _by_hand("hf-cudnn", "HF rotary + SDPA cuDNN + scale", torch_sdpa(cudnn), gpu_full),
        _by_hand("hf-fa2", "HF rotary + SDPA FlashAttention-2 + scale", torch_sdpa(fa2), gpu_full),
        _by_hand("hf-sdpa", "HF rotary + SDPA + scale", torch_sdpa(None), _on("cpu", window=False)),
        _by_hand(
            "hf-compiled-cudnn", "compiled HF rotary + SDPA cuDNN + scale", torch_sdpa(cudnn), gpu_full, compiled=True
        ),
        _scaled("scaled-fa3", "FlashAttention-3 + scale", fa3, fa3_why_not),
        _scaled("scaled-cudnn", "SDPA cuDNN + scale", torch_sdpa(cudnn), gpu_full),
        _scaled("scaled-sdpa", "SDPA + scale", torch_sdpa(None), _on("cpu", window=False)),
        _rotary("hf-rotary", "HF rotary", False),
        _rotary("hf-rotary-compiled", "compiled HF rotary", True),
        _ia3("peft-ia3-cudnn", "SDPA cuDNN + PEFT (IA)³ on o_proj", cudnn, gpu_full),
        _ia3("peft-ia3", "SDPA + PEFT (IA)³ on o_proj", None, _on("cpu", window=False)),
        _decoder("decode-fa3", "FlashAttention-3", lambda p: peers.fa3_decode(p.shape.geometry.window), fa3_why_not),
        _decoder("decode-cudnn", "SDPA cuDNN", torch_sdpa(cudnn), gpu_full),
        _decoder("decode-fa2", "SDPA FlashAttention-2", torch_sdpa(fa2), gpu_full),
        _decoder("decode-efficient", "SDPA memory-efficient", torch_sdpa(SDPBackend.EFFICIENT_ATTENTION), gpu_full),
        _decoder("decode-sdpa", "SDPA", torch_sdpa(None), _on("cpu", window=False)),
    ]
