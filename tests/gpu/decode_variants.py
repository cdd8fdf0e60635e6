"""Times variants of the CUDA decode kernels beside PyTorch's SDPA, each checked against fp64 first.

usage: python tests/gpu/decode_variants.py [--only NAME] [--triton] [--ms 60]
NAME: hd128, hd64, hd256, rows32, rows64, rows71. Needs a Hopper GPU and nvcc.
One table a group of shapes; the bytes' time is K and V read once at 4.3 TB/s (H200) or 3.0 TB/s (H100). The pick goes
into with_config of csrc/cuda/sm90/attention_decode.cu (CUDA) and _DECODE of the Triton backend's configs.py.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/fixtures")]

from cases import Case  # noqa: E402
from decode_cases import assert_every_row, inputs_of  # noqa: E402

import seal_ops  # noqa: E402
from gpu.decode_kit import build, decode, prepare  # noqa: E402
from seal_ops.bench.timing import Clock, in_turn  # noqa: E402

K = 1024
# name: (queries, heads, KV heads, head_dim), [(batch, keys)], variants: head_dim, keys of a block, stages, row tiles,
# key warps, blocks an SM
GROUPS = {
    "hd128": (
        (1, 32, 8, 128),
        [(1, 4 * K), (1, 32 * K), (1, 128 * K), (8, 32 * K), (32, 32 * K), (8, 128 * K)],
        [
            (128, 64, 3, 1, 4, 2),
            (128, 64, 2, 1, 4, 2),
            (128, 64, 2, 1, 4, 3),
            (128, 128, 2, 1, 8, 1),
            (128, 128, 3, 1, 8, 1),
        ],
    ),
    "hd64": (
        (1, 32, 8, 64),
        [(1, 32 * K), (1, 128 * K), (8, 32 * K), (32, 32 * K)],
        [(64, 128, 3, 1, 4, 2), (64, 128, 2, 1, 4, 2), (64, 256, 3, 1, 8, 1)],
    ),
    "hd256": (
        (1, 16, 8, 256),
        [(1, 32 * K), (1, 128 * K), (8, 32 * K), (32, 32 * K)],
        [(256, 64, 3, 1, 4, 1), (256, 32, 2, 1, 2, 3)],
    ),
    "rows32": (
        (8, 32, 8, 128),
        [(1, 32 * K), (8, 32 * K)],
        [(128, 128, 3, 2, 4, 1), (128, 64, 6, 2, 4, 1), (128, 64, 3, 2, 2, 2)],
    ),
    "rows64": (
        (1, 64, 1, 128),
        [(1, 128 * K), (32, 32 * K)],
        [(128, 128, 3, 4, 2, 1), (128, 64, 6, 4, 2, 1), (128, 64, 3, 4, 1, 2)],
    ),
    "rows71": (
        (1, 71, 1, 64),
        [(1, 32 * K), (8, 32 * K), (32, 32 * K)],
        [(64, 128, 6, 5, 2, 1), (64, 128, 6, 4, 2, 1), (64, 64, 6, 5, 2, 1), (64, 128, 6, 3, 2, 1)],
    ),
}
# Keys of a block, warps, stages, programs at work on a multiprocessor (which decides the number of splits).
TRITON = {
    64: [(128, 4, 3, 2), (128, 4, 4, 2), (64, 4, 4, 4), (128, 4, 3, 4), (128, 8, 3, 2)],
    128: [(64, 4, 3, 2), (64, 4, 4, 2), (128, 4, 3, 1), (128, 8, 3, 1), (64, 4, 2, 3), (32, 2, 4, 4), (64, 4, 3, 4)],
    256: [(32, 4, 3, 2), (64, 4, 2, 1), (64, 8, 3, 1), (32, 4, 4, 2), (32, 4, 2, 3)],
}
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa(backend: SDPBackend, q, k, v):
    """What a user calls on a cache: heads first in memory, GQA by flag; several queries need a mask."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = (
        None
        if q.shape[2] == 1
        else torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    )

    def run():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return run


def triton_call(tile, q, k, v, scale):
    """The Triton backend with this tile."""
    from seal_ops.ops.backends.triton import configs
    from seal_ops.ops.backends.triton import decode as kernels

    n, warps, stages, programs = tile
    rows = q.shape[1] * q.shape[2] // k.shape[2]
    chosen = configs.Tile(16 if rows <= 16 else 32 if rows <= 32 else 64, n, warps, stages)

    def call():
        kernels.choose, kernels._PROGRAMS = lambda kernel, like, launch: launch(chosen), programs
        return seal_ops.attention(q, k, v, scale, backend="triton")

    return call


def right(library, index: int, variant, geometry) -> bool:
    """A variant on small ugly shapes, with several splits; prints what is wrong with it."""
    sq, heads, kv_heads, head_dim = geometry
    try:
        for keys, window, splits in ((1000, None, 0), (1000, None, 5), (333, 90, 1), (1, None, 3)):
            case = Case(sq, keys, heads=(heads, kv_heads), head_dim=head_dim, batch=2, window=window, offset=True)
            inputs = inputs_of(case, torch.bfloat16, "cuda")
            out, lse, _ = decode(library, **inputs, splits=splits, variant=index)
            assert_every_row(out, lse, inputs)
        return True
    except AssertionError as reason:
        print(f"WRONG {variant}: {str(reason).splitlines()[0]}")
        return False


def timed(library, variants, good, geometry, batch: int, keys: int, clock: Clock, options) -> tuple[dict, int]:
    """Times by name, and the number of splits that the op would choose."""
    sq, heads, kv_heads, head_dim = geometry
    q = torch.randn(batch, sq, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, kv_heads, keys, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (t.transpose(1, 2) for t in (k, v))
    if options.tokens_first:
        k, v = k.contiguous(), v.contiguous()
    scale = 1 + 0.1 * torch.randn(heads, head_dim, device="cuda")
    calls = {str(variant): prepare(library, q, k, v, scale, variant=variants.index(variant))[0] for variant in good}
    call, _, _, plan = prepare(library, q, k, v, scale)
    calls["table"] = call
    for name, splits in (("half", max(1, plan["splits"] // 2)), ("twice", 2 * plan["splits"])):
        calls[f"table, {name} the splits"] = prepare(library, q, k, v, scale, splits=splits)[0]
    for tile in TRITON[head_dim] if options.triton else ():
        calls[f"triton {tile}"] = triton_call(tile, q, k, v, scale)
    calls |= {name: sdpa(backend, q, k, v) for name, backend in SDPA.items()}
    for name, call in list(calls.items()):
        try:
            call()
        except Exception as reason:  # a backend of SDPA that cannot, a tile that does not fit
            print(f"  {name}: {type(reason).__name__}: {str(reason).splitlines()[0][:100]}")
            del calls[name]
    return in_turn(calls, clock, options.ms, warm_ms=10), plan["splits"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=GROUPS)
    parser.add_argument("--triton", action="store_true", help="time the Triton backend too, tile by tile")
    parser.add_argument("--tokens-first", action="store_true", help="caches [B, S, H, D] in memory, not [B, H, S, D]")
    parser.add_argument("--ms", type=float, default=60, help="device time for each figure")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # SDPA's reasons why a backend cannot: the table shows which did
    names = [options.only] if options.only else list(GROUPS)
    bandwidth = 4.3e6 if "H200" in torch.cuda.get_device_name() else 3.0e6  # bytes a microsecond
    start = time.time()
    variants = tuple(dict.fromkeys(v for name in names for v in GROUPS[name][2]))
    library = build(variants)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; built {len(variants)} variants in "
        f"{time.time() - start:.0f} s",
        flush=True,
    )
    clock, wrong = Clock(torch.device("cuda")), 0
    for name in names:
        geometry, shapes, mine = GROUPS[name]
        sq, heads, kv_heads, head_dim = geometry
        good = [v for v in mine if right(library, variants.index(v), v, geometry)]
        wrong += len(mine) - len(good)
        rows: dict[str, list[str]] = {}
        for batch, keys in shapes:
            times, splits = timed(library, variants, good, geometry, batch, keys, clock, options)
            torch.cuda.empty_cache()
            least = 4.0 * batch * keys * kv_heads * head_dim / bandwidth
            peer = min((t.median for n, t in times.items() if n.startswith("sdpa")), default=float("nan"))
            rows.setdefault("splits of the table", []).append(f"{batch}x{keys // K}k: {splits:7d}" + " " * 13)
            for call, t in times.items():
                share = 1e-3 * least / t.median
                cell = f"{batch}x{keys // K}k: {1e3 * t.median:7.1f} ({share:4.0%}, {t.median / peer:4.2f})"
                rows.setdefault(call, []).append(cell)
                print(f"  {call:38s} {cell}", flush=True)  # at once: a run that is cut has not been for nothing
        print(
            f"\n{name}: {sq} quer{'y' if sq == 1 else 'ies'}, {heads}/{kv_heads} heads of {head_dim}; batch x keys: "
            "microseconds (share of the bytes' time, times the best SDPA's)"
        )
        for call, cells in rows.items():
            print(f"  {call:38s} " + "  ".join(cells), flush=True)
    print(f"\n{time.time() - start:.0f} s in all; {wrong} variants wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
