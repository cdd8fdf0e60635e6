"""Builds variants of the CUDA attention backward from csrc/ alone, checks each against fp64 and times them in turn, in
one call.

    python benchmarks/backward_variants.py                                    # every variant of VARIANTS, a table at the end
    python benchmarks/backward_variants.py --variants base,tail,pdl --shapes hd128-2k --seconds 200 --out results.json

A variant is a set of -D flags (csrc/cuda/sm90/backward_switches.cuh); needs nvcc, a Hopper GPU and torch, no build of
seal_ops. Each variant is checked in a process of its own with a time limit, so that one that hangs or faults stops only
itself. Checked: all gradients per head and quarter of the rows against fp64, with NaN in the workspace and the outputs
beforehand, and three repetitions of grad_k, grad_v and grad_scale bit for bit (only grad_q is added up in a changing
order).
"""  # noqa: E501

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import torch

DEVICE = "cuda"
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SWITCHES = {
    "fill": "FILL",
    "divisors": "DIVISORS",
    "pdl": "PDL",
    "heads": "HEADS_FIRST",
    "late": "LATE_EXACT",
    "quad": "QUAD_VECTORS",
    "persistent": "PERSISTENT",
    "stores": "PLAIN_STORES",
    "ordered": "ORDERED",
    "light": "LIGHT",
    "copy": "COPY_OUT",
}
CORE = "pdl heads quad stores"
VARIANTS = {
    "base": "",
    "small": f"{CORE} late fill divisors",
    "core": f"{CORE} persistent",
    "fill": f"{CORE} persistent fill",
    "divisors": f"{CORE} persistent fill divisors",
    "light": f"{CORE} persistent fill divisors light",
    "copy": f"{CORE} persistent fill divisors copy",
    "ordered": f"{CORE} persistent fill divisors light copy ordered",
}

# name: batch, rows of q, rows of k, heads of q, heads of k, head_dim
SHAPES = {
    "hd128-8k": (4, 8192, 8192, 32, 8, 128),
    "hd128-8k-deterministic": (4, 8192, 8192, 32, 8, 128),
    "hd128-mha-1k": (32, 1024, 1024, 32, 32, 128),
    "hd128-mha-4k": (8, 4096, 4096, 32, 32, 128),
    "hd128-2k": (16, 2048, 2048, 32, 8, 128),
    "hd128-8k-64": (2, 8192, 8192, 64, 8, 128),
    "hd64-4k": (8, 4096, 4096, 64, 64, 64),
    "hd64-4k-deterministic": (8, 4096, 4096, 64, 64, 64),
    "hd128-8k-b1": (1, 8192, 8192, 32, 8, 128),
    "hd128-2k-b1": (1, 2048, 2048, 32, 8, 128),
    "hd64-16k": (2, 16384, 16384, 64, 64, 64),
    "hd256-8k": (4, 8192, 8192, 16, 16, 256),
    "hd128-32k": (1, 32768, 32768, 32, 8, 128),
}


# ---- building

UNIT = """#include "cuda/sm90/attention_backward_launch.cuh"
namespace seal::sm90 {{
template cudaError_t launch_backward<__nv_bfloat16, {dim}>(const BackwardKernelParams&, cudaStream_t);
template <>
cudaError_t launch_backward<__half, {dim}>(const BackwardKernelParams&, cudaStream_t) {{ return cudaErrorNotSupported; }}
}}
"""  # noqa: E501

# Numbers and addresses in the order of `Call` below.
WRAPPER = """#include "cuda/attention_backward.h"
namespace {
seal::AttentionBackwardParams make(const long long* n, void* const* a, float softmax_scale) {
  seal::AttentionBackwardParams p{};
  p.batch = n[0], p.seqlen_q = n[1], p.seqlen_k = n[2], p.heads_q = n[3], p.heads_k = n[4], p.head_dim = n[5];
  p.window_left = n[6], p.window_right = n[7], p.deterministic = n[8];
  p.softmax_scale = softmax_scale;
  const auto tensor = [&](void* data, int rows, int heads) {
    const long long row = static_cast<long long>(heads) * p.head_dim;
    return seal::BackwardTensor{data, row * rows, row, p.head_dim};
  };
  p.q = tensor(a[0], p.seqlen_q, p.heads_q), p.k = tensor(a[1], p.seqlen_k, p.heads_k), p.v = tensor(a[2], p.seqlen_k, p.heads_k);
  p.out = tensor(a[3], p.seqlen_q, p.heads_q), p.grad_out = tensor(a[4], p.seqlen_q, p.heads_q);
  p.lse = static_cast<float*>(a[5]);
  p.scale = static_cast<float*>(a[6]), p.scale_head_stride = p.head_dim, p.scale_channel_stride = 1;
  p.grad_q = a[7], p.grad_k = a[8], p.grad_v = a[9], p.grad_scale = static_cast<float*>(a[10]);
  p.grad_scale_per_channel = true;
  p.cu_seqlens_q = static_cast<int*>(a[11]), p.cu_seqlens_k = static_cast<int*>(a[12]);
  p.cos = a[13], p.sin = a[14], p.cos_type = 2;
  p.rotary_dim = n[9], p.cos_rows = n[10], p.cos_row_stride = p.sin_row_stride = n[9] / 2, p.interleaved = n[11];
  p.positions_q.first = p.cu_seqlens_q == nullptr && p.seqlen_k > p.seqlen_q ? p.seqlen_k - p.seqlen_q : 0;
  p.workspace = a[15];
  p.enough_ctas = n[12], p.multiprocessors = n[13];
  return p;
}
}
extern "C" unsigned long long seal_workspace(const long long* n, void* const* a, float softmax_scale) {
  return seal::attention_backward_workspace(make(n, a, softmax_scale));
}
extern "C" int seal_backward(const long long* n, void* const* a, float softmax_scale, void* stream) {
  return seal::launch_attention_backward(make(n, a, softmax_scale), static_cast<cudaStream_t>(stream));
}
"""  # noqa: E501


def build(names: list[str], dims: list[int], folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Compiles the variants side by side; a library for each. Raises CalledProcessError with the compiler's words."""
    common = [
        "nvcc",
        "-O3",
        "-std=c++17",
        "--expt-relaxed-constexpr",
        "-Xptxas",
        "-v",
        "-DNDEBUG",
        "-Xcompiler",
        "-fPIC",
        "-gencode=arch=compute_90a,code=sm_90a",
        f"-I{ROOT / 'csrc'}",
    ]
    jobs: list[list[str]] = []
    objects: dict[str, list[pathlib.Path]] = {}
    for dim in (64, 128, 256):
        stub = (
            UNIT
            if dim in dims
            else UNIT.replace(
                "template cudaError_t launch_backward<__nv_bfloat16, {dim}>",
                "template <> cudaError_t launch_backward<__nv_bfloat16, {dim}>",
            ).replace("&, cudaStream_t);", "&, cudaStream_t) {{ return cudaErrorNotSupported; }}", 1)
        )
        (folder / f"hd{dim}.cu").write_text(stub.format(dim=dim))
    (folder / "wrapper.cu").write_text(WRAPPER)
    for name in names:
        flags = [f"-DSEAL_BACKWARD_{SWITCHES[switch]}=1" for switch in VARIANTS[name].split()]
        for source in [
            folder / "wrapper.cu",
            ROOT / "csrc/cuda/sm90/attention_backward.cu",
            *(folder / f"hd{dim}.cu" for dim in (64, 128, 256)),
        ]:
            target = folder / f"{name}-{source.stem}.o"
            objects.setdefault(name, []).append(target)
            jobs.append([*common, *flags, "-c", "-o", str(target), str(source)])
    # The longest first: head_dim 256, then 128, 64.
    jobs.sort(key=lambda job: -sum(("hd256" in job[-1], "hd128" in job[-1], "hd" in job[-1])))
    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        for job, done in zip(jobs, pool.map(lambda job: subprocess.run(job, capture_output=True, text=True), jobs)):
            if done.returncode != 0:
                raise SystemExit(f"{' '.join(job)}\n{done.stderr[-3000:]}")
            spilled = [
                line
                for line in done.stderr.splitlines()
                if "spill stores" in line and " 0 bytes spill stores" not in line
            ]
            if spilled:
                print(f"{pathlib.Path(job[-2]).stem}: {len(spilled)} kernels spill, {spilled[0].strip()}")
    libraries = {}
    for name, parts in objects.items():
        libraries[name] = folder / f"{name}.so"
        subprocess.run(["nvcc", "-shared", "-o", libraries[name], *map(str, parts)], check=True)
    return libraries


# ---- calling


class Call:
    """One backward: tensors, and the two arrays that the libraries take."""

    def __init__(
        self,
        shape,
        *,
        causal=True,
        window=-1,
        deterministic=False,
        scale="channel",
        cu=None,
        rotary=0,
        interleaved=False,
        seed=0,
        enough_ctas=0,
        multiprocessors=0,
        grads="qkvs",
    ):
        batch, rows_q, rows_k, heads_q, heads_k, dim = shape
        self.shape, self.causal, self.window, self.cu, self.rotary, self.interleaved = (
            shape,
            causal,
            window,
            cu,
            rotary,
            interleaved,
        )
        generator = torch.Generator(DEVICE).manual_seed(seed)
        normal = lambda rows, heads: torch.randn(batch, rows, heads, dim, generator=generator, device=DEVICE).bfloat16()
        self.q, self.k, self.v, self.grad = (
            normal(rows_q, heads_q),
            normal(rows_k, heads_k),
            normal(rows_k, heads_k),
            normal(rows_q, heads_q),
        )
        self.scale = None
        if scale is not None:
            self.scale = 1 + 0.2 * torch.randn(heads_q, dim, generator=generator, device=DEVICE)
            if scale == "zeros":  # in every second head, which must then be walked through again
                self.scale[::2, 3] = 0
        self.cos = self.sin = None
        if rotary:
            angles = torch.arange(max(rows_q, rows_k), device=DEVICE).double()[:, None] * 10_000.0 ** (
                -torch.arange(rotary // 2, device=DEVICE).double() / (rotary // 2)
            )
            self.cos, self.sin = angles.cos().float(), angles.sin().float()
        self.softmax_scale = dim**-0.5
        self.grads, self.deterministic = grads, deterministic
        sequences = len(cu[0]) - 1 if cu else batch
        left = window - 1 if window > 0 else -1
        self.numbers = (ctypes.c_longlong * 14)(
            sequences,
            rows_q,
            rows_k,
            heads_q,
            heads_k,
            dim,
            left,
            0 if causal else -1,
            deterministic,
            rotary,
            max(rows_q, rows_k),
            interleaved,
            enough_ctas,
            multiprocessors,
        )
        self.cu_tensors = [torch.tensor(c, dtype=torch.int32, device=DEVICE) for c in cu] if cu else [None, None]

    def forward(self) -> None:
        """`out` and `lse` by SDPA (square causal shapes, where only time and the heads that are compared count)."""
        group = self.q.shape[2] // self.k.shape[2]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            self.q.transpose(1, 2),
            self.k.transpose(1, 2).repeat_interleave(group, 1),
            self.v.transpose(1, 2).repeat_interleave(group, 1),
            0.0,
            True,
        )[:2]
        self.lse = lse.contiguous()
        out = out.transpose(1, 2)
        self.out = (out.float() * self.scale).bfloat16() if self.scale is not None else out.contiguous()

    def prepare(self) -> None:
        empty = lambda like: torch.full_like(like, float("nan"))
        pick = lambda letter, like: empty(like) if letter in self.grads else None
        self.results = {
            "q": pick("q", self.q),
            "k": pick("k", self.k),
            "v": pick("v", self.v),
            "s": pick("s", self.scale) if self.scale is not None else None,
        }

    def bind(self, library: ctypes.CDLL):
        """A function that runs the library's backward on this call's tensors."""
        tensors = [
            self.q,
            self.k,
            self.v,
            self.out,
            self.grad,
            self.lse,
            self.scale,
            *self.results.values(),
            *self.cu_tensors,
            self.cos,
            self.sin,
        ]
        addresses = (ctypes.c_void_p * 16)(*(None if t is None else t.data_ptr() for t in tensors), None)
        library.seal_workspace.restype = ctypes.c_ulonglong
        sigma = ctypes.c_float(self.softmax_scale)
        workspace = torch.full(
            (library.seal_workspace(self.numbers, addresses, sigma),), 255, dtype=torch.uint8, device=DEVICE
        )
        addresses[15] = workspace.data_ptr()
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

        def run():
            status = library.seal_backward(self.numbers, addresses, sigma, stream)
            if status != 0:
                raise RuntimeError(f"launch failed with CUDA error {status}")

        run.workspace = workspace
        return run


# ---- checking

TOLERANCE = 0.012  # relative error of a cell in bf16: two to three times what the kernels have
LIMITS = {"repeat": 0.0}


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The inverse rotation of rows x [rows, channels] by angles [rows, R / 2]."""
    half = cos.shape[1]
    first, second = (
        (x[:, 0 : 2 * half : 2], x[:, 1 : 2 * half : 2]) if interleaved else (x[:, :half], x[:, half : 2 * half])
    )
    a, b = first * cos + second * sin, second * cos - first * sin
    result = x.clone()
    if interleaved:
        result[:, 0 : 2 * half : 2], result[:, 1 : 2 * half : 2] = a, b
    else:
        result[:, :half], result[:, half : 2 * half] = a, b
    return result


def oracle(call: Call, b: int, head_k: int, rows_q: slice, rows_k: slice):
    """fp64 forward and gradients of one sequence and the query heads of one key/value head: out, lse, dq, dk, dv,
    dscale; and how far the rounding of `out`, an input of the backward, may move a row of dq and dk: where a row sees
    few keys, its dS cancels almost wholly, and that rounding is all there is.
    """
    group = call.q.shape[2] // call.k.shape[2]
    k, v = call.k[b, rows_k, head_k].double(), call.v[b, rows_k, head_k].double()
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    length_q, length_k = rows_q.stop - rows_q.start, k.shape[0]
    shift = length_k - length_q
    outs, lses, dqs, dscales, noise_q, noise_k = (
        [],
        [],
        [],
        [],
        [],
        torch.zeros(len(k), device=DEVICE, dtype=torch.double),
    )
    key = torch.arange(length_k, device=DEVICE)
    for head in range(head_k * group, (head_k + 1) * group):
        scale = (
            call.scale[head].double()
            if call.scale is not None
            else torch.ones(k.shape[1], device=DEVICE, dtype=torch.double)
        )
        out, lse, dq, noise, dscale = [], [], [], [], torch.zeros_like(scale)
        for start in range(0, max(1, length_q), 2048):  # once for an empty sequence too
            rows = slice(rows_q.start + start, min(rows_q.start + start + 2048, rows_q.stop))
            position = torch.arange(start, start + rows.stop - rows.start, device=DEVICE)[:, None] + shift
            q, grad = call.q[b, rows, head].double(), call.grad[b, rows, head].double()
            scores = q @ k.T * call.softmax_scale
            seen = torch.ones_like(scores, dtype=torch.bool)
            if call.causal:
                seen &= key <= position
            if call.window > 0:
                seen &= key > position - call.window
            scores = scores.masked_fill(~seen, -torch.inf)
            log = scores.logsumexp(1)
            p = torch.where(seen, (scores - log[:, None]).exp(), 0.0).nan_to_num(0.0)
            o = p @ v
            g = grad * scale
            ds = p * (g @ v.T - (g * o).sum(1, keepdim=True)) * call.softmax_scale
            rounding = 2**-9 * call.softmax_scale * (g * o).norm(dim=1)  # of delta, rowsum(g * out)
            out.append(o * scale), lse.append(log), dq.append(ds @ k), noise.append(rounding * (p @ k).norm(dim=1))
            noise_k += (p * (rounding * q.norm(dim=1))[:, None]).square().sum(0)
            dk += ds.T @ q
            dv += p.T @ g
            dscale += (grad * o).sum(0)
        outs.append(torch.cat(out)), lses.append(torch.cat(lse)), dqs.append(torch.cat(dq)), dscales.append(dscale)
        noise_q.append(torch.cat(noise))
    if call.rotary:
        first = max(0, call.k.shape[1] - call.q.shape[1]) if call.cu is None else 0
        at = lambda rows, offset: (
            call.cos[rows.start + offset : rows.stop + offset].double(),
            call.sin[rows.start + offset : rows.stop + offset].double(),
        )
        dqs = [turned(dq, *at(rows_q, first), call.interleaved) for dq in dqs]
        dk = turned(dk, *at(rows_k, 0), call.interleaved)
    return (
        torch.stack(outs, 1),
        torch.stack(lses),
        torch.stack(dqs, 1),
        dk,
        dv,
        torch.stack(dscales),
        torch.stack(noise_q, 1),
        noise_k.sqrt(),
    )


def sequences(call: Call):
    """(batch row, rows of q, rows of k) of every sequence."""
    if call.cu is None:
        return [(b, slice(0, call.q.shape[1]), slice(0, call.k.shape[1])) for b in range(call.q.shape[0])]
    return [(0, slice(*q), slice(*k)) for q, k in zip(zip(call.cu[0], call.cu[0][1:]), zip(call.cu[1], call.cu[1][1:]))]


def worst_cell(got: torch.Tensor, want: torch.Tensor, noise: torch.Tensor | None = None) -> float:
    """The largest relative error among the heads and quarters of the rows of [rows, heads, channels]; `noise` [rows,
    heads]: what a row may be off by whatever its size, eight times over (dS and scale * g are rounded as well)."""
    worst = 0.0
    for rows in torch.arange(want.shape[0], device=want.device).chunk(4):
        error, size = (got[rows] - want[rows]).norm(dim=(0, 2)), want[rows].norm(dim=(0, 2))
        if noise is not None:
            size = size + 8 / TOLERANCE * noise[rows].norm(dim=0)
        relative = torch.where(error == 0, 0.0, error / size)
        worst = max(worst, relative.nan_to_num(torch.inf).max().item())
    return worst


def check(
    library: ctypes.CDLL, call: Call, compared: list[tuple[int, slice, slice, int]], whole: bool
) -> dict[str, float]:
    """Worst relative errors by gradient; "repeat" 0 where three runs agree bit for bit. compared: (batch row, rows,
    rows, key/value head)."""
    wants = [oracle(call, b, head, q, k) for b, q, k, head in compared]
    if whole:  # out and lse for every sequence, from the oracle
        call.out, call.lse = (
            torch.zeros_like(call.q),
            torch.zeros(call.q.shape[0], call.q.shape[2], call.q.shape[1], device=DEVICE),
        )
        group = call.q.shape[2] // call.k.shape[2]
        for (b, q, _, head), want in zip(compared, wants):
            call.out[b, q, head * group : (head + 1) * group] = want[0].to(call.out.dtype)
            call.lse[b, head * group : (head + 1) * group, q] = want[1].float()
    group, errors, first, repeat = call.q.shape[2] // call.k.shape[2], {}, None, 0.0
    for _ in range(3):
        call.prepare()
        call.bind(library)()
        torch.cuda.synchronize()
        again = [t for letter, t in call.results.items() if (letter != "q" or call.deterministic) and t is not None]
        if first is not None and not all(
            torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(first, again)
        ):
            repeat = 1.0
        first = again
    add = lambda name, value: errors.__setitem__(name, max(errors.get(name, 0.0), value))
    sums = torch.zeros(call.q.shape[2:], device=DEVICE, dtype=torch.double)
    for (b, q, k, head), (_, _, dq, dk, dv, dscale, noise_q, noise_k) in zip(compared, wants):
        heads = slice(head * group, (head + 1) * group)
        if q.stop > q.start and call.results["q"] is not None:
            add("q", worst_cell(call.results["q"][b, q, heads].double(), dq, noise_q))
        if k.stop > k.start and call.results["k"] is not None:
            add("k", worst_cell(call.results["k"][b, k, head].double()[:, None], dk[:, None], noise_k[:, None]))
        if k.stop > k.start and call.results["v"] is not None:
            add("v", worst_cell(call.results["v"][b, k, head].double()[:, None], dv[:, None]))
        sums[heads] += dscale
    if whole and call.results["s"] is not None:
        error = (call.results["s"].double() - sums).norm(dim=1) / sums.norm(dim=1)
        add("s", error.nan_to_num(torch.inf).max().item())
    errors["repeat"] = repeat
    return errors


def ugly() -> dict[str, Call]:
    """Small calls at the edges: odd lengths, rectangles, windows, groups, packed sequences, zeros in the scale,
    rotation."""
    cu = ([0, 5, 5, 260, 700, 701], [0, 7, 90, 400, 840, 960])
    long = [0]
    for i in range(70):
        long.append(long[-1] + (i * 97) % 301)
    calls = {}
    for dim in (64, 128, 256):
        calls |= {
            f"hd{dim} one": Call((2, 1, 1, 2, 1, dim)),
            f"hd{dim} odd": Call((2, 217, 217, 4, 2, dim)),
            f"hd{dim} zeros": Call((2, 333, 333, 8, 2, dim), scale="zeros"),
            f"hd{dim} zeros, short": Call((3, 100, 100, 8, 2, dim), scale="zeros", enough_ctas=1),
            f"hd{dim} zeros, whole group": Call((2, 700, 700, 8, 2, dim), scale="zeros", enough_ctas=1),
            f"hd{dim} zeros, half group": Call(
                (1, 700, 700, 8, 1, dim), scale="zeros", enough_ctas=6 * (2 if dim < 256 else 4)
            ),
            f"hd{dim} chained": Call((3, 700, 700, 4, 4, dim), multiprocessors=3),
            f"hd{dim} chained, zeros": Call((3, 513, 513, 8, 4, dim), scale="zeros", enough_ctas=1, multiprocessors=2),
            f"hd{dim} full": Call((1, 300, 517, 4, 2, dim), causal=False),
            f"hd{dim} more queries": Call((2, 400, 129, 4, 2, dim)),
            f"hd{dim} more keys": Call((2, 129, 900, 4, 2, dim), enough_ctas=1),
            f"hd{dim} window": Call((2, 1023, 1023, 4, 2, dim), window=200, enough_ctas=1, multiprocessors=5),
            f"hd{dim} packed": Call((1, 701, 960, 4, 2, dim), cu=cu, scale="zeros"),
            f"hd{dim} packed many": Call(
                (1, long[-1], long[-1], 4, 2, dim), cu=(long, long), enough_ctas=1, multiprocessors=7
            ),
            f"hd{dim} rotated": Call((2, 300, 300, 4, 2, dim), rotary=dim // 2, multiprocessors=3, enough_ctas=1),
            f"hd{dim} interleaved": Call((2, 300, 300, 4, 2, dim), rotary=dim, interleaved=True),
            f"hd{dim} no scale": Call((2, 600, 600, 4, 4, dim), scale=None, grads="qkv"),
            f"hd{dim} keys only": Call((2, 300, 300, 4, 2, dim), grads="kvs", enough_ctas=1),
            f"hd{dim} values only": Call((2, 300, 300, 4, 2, dim), scale="zeros", grads="vs", enough_ctas=1),
            f"hd{dim} scale only": Call((2, 300, 300, 4, 2, dim), scale="zeros", grads="s", enough_ctas=1),
            f"hd{dim} deterministic": Call((2, 500, 500, 4, 2, dim), deterministic=True),
            f"hd{dim} deterministic, chained": Call(
                (2, 1100, 1100, 4, 2, dim), deterministic=True, enough_ctas=1, multiprocessors=6
            ),
            f"hd{dim} deterministic, window": Call(
                (1, 1023, 1300, 4, 2, dim), deterministic=True, window=300, enough_ctas=9
            ),
            f"hd{dim} deterministic, packed": Call(
                (1, long[-1], long[-1], 4, 2, dim),
                cu=(long, long),
                deterministic=True,
                enough_ctas=1,
                multiprocessors=7,
            ),
        }
    return calls


def call_of(name: str) -> Call:
    call = Call(SHAPES[name], deterministic=name.endswith("deterministic"))
    call.forward()
    return call


def check_variant(library: ctypes.CDLL, names: list[str], dims: list[int]) -> list[str]:
    """What is wrong with a variant, a line each."""
    faults = []

    def judge(name: str, errors: dict[str, float]):
        for key, value in errors.items():
            if not value <= LIMITS.get(key, TOLERANCE):
                faults.append(f"{name}: {key} {value:.2e}")

    for name, call in ugly().items():
        if call.shape[5] in dims:
            compared = [(b, q, k, head) for b, q, k in sequences(call) for head in range(call.k.shape[2])]
            try:
                judge(name, check(library, call, compared, True))
            except RuntimeError as error:
                return [*faults, f"{name}: {str(error).splitlines()[0]}"]
    for name in names:
        call = call_of(name)
        b, q, k = sequences(call)[-1]
        judge(name, check(library, call, [(b, q, k, call.k.shape[2] - 1)], False))
    return faults


# ---- timing


def time_variants(
    libraries: dict[str, ctypes.CDLL], names: list[str], budget_ms: float, fa3: str | None, left
) -> dict[str, dict[str, float]]:
    """TFLOP/s of every variant, and of FlashAttention-3 without a scale where there is one, for every shape."""
    from seal_ops.bench import peers, timing

    reason = peers.load_fa3(fa3) if fa3 else "not asked for"
    if fa3 and reason:
        print(reason)

    clock, table = timing.Clock(torch.device(DEVICE)), {}
    for name in names:
        if left() < 10:
            print(f"out of time: {', '.join(names[names.index(name) :])} not timed")
            break
        call = call_of(name)
        call.prepare()
        calls = {variant: call.bind(library) for variant, library in libraries.items()}
        if reason is None:
            leaves = [t.detach().requires_grad_() for t in (call.q, call.k, call.v)]
            out = peers.fa3(None)(*leaves)
            calls["fa3"] = lambda out=out, leaves=leaves, g=call.grad: torch.autograd.grad(
                out, leaves, g, retain_graph=True
            )
        for run in calls.values():
            run()
        torch.cuda.synchronize()
        times = timing.in_turn(calls, clock, budget_ms, rounds=5)
        batch, rows, _, heads, _, dim = SHAPES[name]
        flops = 2.5 * 4 * batch * heads * dim * rows * rows / 2
        table[name] = {variant: flops / t.median / 1e9 for variant, t in times.items()}
        base = next(iter(table[name].values()))
        print(
            f"{name:22} "
            + "  ".join(f"{variant} {value:.0f} ({value / base:.3f})" for variant, value in table[name].items()),
            flush=True,
        )
        time.sleep(0.5)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants",
        default=",".join(VARIANTS),
        help="names of VARIANTS; the first is what the others are compared with",
    )
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument(
        "--seconds", type=float, default=330, help="for everything together; what does not fit is left out and said"
    )
    parser.add_argument("--budget-ms", type=float, default=90, help="of timed calls for each variant and shape")
    parser.add_argument(
        "--fa3",
        metavar="FOLDER",
        help="folder with FlashAttention-3's library, which is timed as well (seal bench --fa3)",
    )
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for the results")
    parser.add_argument("--check", type=pathlib.Path, help=argparse.SUPPRESS)  # one library, in a process of its own
    options = parser.parse_args()
    names, shapes = options.variants.split(","), options.shapes.split(",")
    dims = sorted({SHAPES[shape][5] for shape in shapes})
    if options.check:
        faults = check_variant(ctypes.CDLL(str(options.check)), shapes, dims)
        print("\n".join(faults))
        sys.exit(bool(faults))

    begin = time.monotonic()
    left = lambda: options.seconds - (time.monotonic() - begin)
    folder = pathlib.Path(tempfile.mkdtemp())
    paths = build(names, dims, folder)
    print(f"built in {time.monotonic() - begin:.0f} s", flush=True)

    def check_alone(name: str) -> tuple[str, str]:
        command = [sys.executable, __file__, "--check", str(paths[name]), "--shapes", ",".join(shapes)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=min(120, max(20, left())))
        except subprocess.TimeoutExpired:
            return name, "does not end"
        return name, "" if done.returncode == 0 else done.stdout.strip() or done.stderr.strip()[-600:]

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        verdicts = dict(pool.map(check_alone, names))
    for name, fault in verdicts.items():
        print(f"{name}: {'right' if not fault else fault}", flush=True)
    print(f"checked at {time.monotonic() - begin:.0f} s", flush=True)
    # What the first variant gets wrong as well is no fault of the others.
    cases = lambda name: {line.rsplit(" ", 1)[0] for line in verdicts[name].splitlines()}
    right = {name: ctypes.CDLL(str(paths[name])) for name in names if cases(name) <= cases(names[0])}
    table = time_variants(right, shapes, options.budget_ms, options.fa3, left) if right else {}
    if options.out:
        options.out.write_text(
            json.dumps({"card": torch.cuda.get_device_name(), "verdicts": verdicts, "tflops": table}, indent=1)
        )
    print(f"all in {time.monotonic() - begin:.0f} s")
    sys.exit(any(verdicts.values()))


if __name__ == "__main__":
    main()
