"""Random calls, right and wrong, in every layout: each ends in the right result or in one sentence.

Nothing here knows which calls are wrong. A result is held against the formulae of docs/ops.md, written once more in
fp64 with autograd for the gradients, in every cell (batch row, head); an error has to be one line that names the op.
"""

import math
import random
import warnings

import pytest
import torch

from seal_ops.ops.dispatch import why_not

CHUNK = 50  # calls a test: a failure names its seed, and the same seed makes the same call again
# Relative errors a cell, outputs and gradients: about twice the largest of 11,000 calls on a CPU. In half precision it
# is grad_q and grad_k, where a difference of rounded numbers is all that there is.
TOLERANCE = {
    torch.float64: (1e-14, 2e-14),
    torch.float32: (1e-6, 1e-5),
    torch.float16: (1e-3, 4e-2),
    torch.bfloat16: (1e-2, 0.2),
}
OTHER_DTYPES = (torch.float16, torch.float32, torch.float64, torch.int64, torch.complex64, torch.bool)
OPS = ("attention", "attention", "rope_attention", "rope")


def chunks(backend: str, device: torch.device) -> int:
    """1,000 calls; fewer for Triton, which compiles for every kind of call, and very few for its interpreter."""
    if backend != "triton":
        return 20
    return 6 if device.type == "cuda" else 1


# ---- the formulae


def _angles(table, positions, tokens, first):
    if table.dim() == 3:
        return table.double()[:, :, None]
    at = torch.arange(first, first + tokens, device=table.device) if positions is None else positions.long()
    return table.double()[at][..., None, :]


def rotated(x, cos, sin, interleaved, inverse):
    """As a multiplication of complex numbers."""
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    real, imaginary = (
        turning.unflatten(-1, (half, 2)).unbind(-1) if interleaved else turning.unflatten(-1, (2, half)).unbind(-2)
    )
    turned = torch.complex(real, imaginary) * torch.complex(cos, -sin if inverse else sin)
    turned = torch.stack((turned.real, turned.imag), -1 if interleaved else -2).flatten(-2)
    return torch.cat((turned, rest), -1)


def by_hand(op: str, a: dict) -> list[torch.Tensor]:
    """Outputs of `rope`, or (out, lse), in fp64; `a` holds fp64 leaves for q, k, v, scale and offset."""
    q, k = a["q"], a["k"]
    sq, sk = q.shape[-3], k.shape[-3]
    if a.get("cos") is not None:
        at_k = a["positions"] if a.get("positions_k") is None else a["positions_k"]
        turn = lambda x, at, first: rotated(
            x,
            *(_angles(a[n], at, x.shape[-3], first) for n in ("cos", "sin")),
            a.get("interleaved", False),
            a.get("inverse", False),
        )
        q, k = turn(q, a["positions"], max(0, sk - sq)), turn(k, at_k, 0)
        if op == "rope":
            return [q, k]
    heads, head_dim = q.shape[-2:]
    cu = a.get("cu_seqlens")
    if cu is None:
        rows = [(b, b) for b in range(q.shape[0])]
    else:
        cu_k = cu if a.get("cu_seqlens_k") is None else a["cu_seqlens_k"]
        spans = lambda c: [slice(*pair) for pair in zip(c.tolist(), c.tolist()[1:])]
        rows = list(zip(spans(cu), spans(cu_k)))

    def factor(t, n):
        if t is None or t.shape == (heads, head_dim):
            return t
        if t.dim() == 1:
            return t[:, None]
        t = t if t.dim() == 3 else t[..., None]
        return t[n % t.shape[0]]

    outs, lses = [], []
    for n, (in_q, in_k) in enumerate(rows):
        scores = torch.einsum("ihd,jhd->hij", q[in_q], k[in_k].repeat_interleave(heads // k.shape[-2], 1))
        scores = scores * (a["softmax_scale"] if a.get("softmax_scale") is not None else 1 / math.sqrt(head_dim))
        place = torch.arange(scores.shape[1], device=q.device)[:, None] + scores.shape[2] - scores.shape[1]
        other = torch.arange(scores.shape[2], device=q.device)[None, :]
        if a.get("mask") is not None:
            seen = masked(a["mask"], place, other, heads)
        else:
            seen = (other <= place) if a.get("causal", True) else torch.ones_like(other <= place)
            if a.get("window") is not None:
                seen = seen & ((place - other).abs() < a["window"])
        if a.get("blocks") is not None:
            seen = seen & in_blocks(a["blocks"][n % len(a["blocks"])], a.get("block_size", 128), *scores.shape[1:])
        alive = seen.any(-1)
        scores = torch.where(alive[..., None], scores.masked_fill(~seen, -math.inf), 0.0)
        p = torch.softmax(scores, -1) * alive[..., None]
        o = torch.einsum("hij,jhd->ihd", p, a["v"][in_k].repeat_interleave(heads // k.shape[-2], 1))
        scale, offset = factor(a.get("scale"), n), factor(a.get("offset"), n)
        o = o if scale is None else o * scale
        outs.append(o if offset is None else o + offset)
        lses.append(torch.where(alive, torch.logsumexp(scores, -1), -math.inf))
    if cu is None:
        return [
            torch.stack(outs) if outs else torch.zeros_like(q),
            torch.stack(lses) if lses else q.new_zeros(0, heads, sq),
        ]
    return [
        torch.cat(outs) if outs else torch.zeros_like(q),
        torch.cat(lses, 1) if lses else q.new_full((heads, sq), -math.inf),
    ]


def masked(mask: list, place: torch.Tensor, other: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads, Sq, Sk] of the op's eight integers: the sentence of docs/ops.md, without a bound on numbers."""
    lower, upper, chunk, chunk_lower, chunk_upper, shift, shifted_from, sinks = mask
    distance = other - place
    seen = ((lower <= distance) & (distance <= upper)).repeat(heads, 1, 1)
    if chunk:
        for head in range(heads):
            own = shift if head >= shifted_from else 0
            apart = (other + own).div(chunk, rounding_mode="floor") - (place + own).div(chunk, rounding_mode="floor")
            seen[head] &= (chunk_lower <= apart) & (apart <= chunk_upper)
    return seen | ((other < sinks) & (other <= place))


def in_blocks(visited: torch.Tensor, size: int, sq: int, sk: int) -> torch.Tensor:
    """[heads or 1, Sq, Sk] of a map of blocks."""
    row, column = (torch.arange(n, device=visited.device) // size for n in (sq, sk))
    return visited[:, row][:, :, column]


# ---- random calls


def apart(rng: random.Random, what: str) -> random.Random:
    """Draws that leave those of `rng` as they are: the calls of a seed do not change with a new kind of argument."""
    return random.Random(f"{what}-{rng.getstate()[1][:4]}")


def random_mask(rng: random.Random, kv_heads: int, group: int) -> list:
    far = 2**30
    lower, upper = sorted((rng.choice((-far, -3, -1, rng.randint(-9, 9))), rng.choice((0, 0, far, rng.randint(-9, 9)))))
    chunk = rng.choice((0, 0, 1, 2, 3, 5, 1000))
    chunk_lower, chunk_upper = rng.choice(((-far, far), (0, 0), (-1, -1), (-far, -2), (-1, 1), (0, far)))
    shifted = chunk > 1 and rng.random() < 0.5
    shift, shifted_from = (rng.randrange(chunk), group * rng.randint(0, kv_heads)) if shifted else (0, far)
    return [lower, upper, chunk, chunk_lower, chunk_upper, shift, shifted_from, rng.choice((0, 0, 1, 4, far))]


def scattered(t: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The same values in another memory layout: another order of dimensions, gaps, a start off any alignment."""
    if t.dim() == 0 or rng.random() < 0.4:
        return t
    order = list(range(t.dim()))
    if rng.random() < 0.5:
        rng.shuffle(order)
    frame = [t.shape[d] + rng.choice((0, 0, 1, 3)) for d in order]
    start = rng.choice((0, 0, 1))
    buffer = torch.full(
        (math.prod(frame) + start,), math.nan if t.is_floating_point() else 1, dtype=t.dtype, device=t.device
    )
    view = buffer[start:].view(frame).permute([order.index(d) for d in range(t.dim())])
    view = view[tuple(slice(0, n) for n in t.shape)]
    return view.copy_(t)


def random_call(rng: random.Random, backend: str, device: torch.device) -> tuple[str, dict]:
    """An op and its arguments, inside the contract."""
    op = rng.choice(OPS)
    triton = backend == "triton"
    dtypes = {
        "cpu": (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16),
        "reference": (torch.float64, torch.float32),
        "triton": (torch.float32,),
        "cuda": (torch.bfloat16, torch.float16),
    }[backend]
    dtype = rng.choice(dtypes)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    head_dim = rng.choice(
        (16, 32) if triton else (8, 16, 40, 64, 128, 256) if backend == "cuda" else (1, 2, 3, 8, 12, 16, 33)
    )
    if op != "attention":
        head_dim = max(2, head_dim)
    largest = 300 if backend == "cuda" and rng.random() < 0.3 else 9
    of_blocks = apart(rng, "blocks")
    listed = op != "rope" and backend != "cuda" and of_blocks.random() < 0.2  # the CUDA kernels take no block lists
    largest = 100 if listed else largest
    kv_heads = rng.randint(1, 3)
    heads = kv_heads * rng.choice((0, 1, 1, 1, 2, 2, 2, 3, 3, 3))
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    randn = lambda *shape, dtype=dtype: scattered(torch.randn(shape, generator=generator).to(dtype).to(device), rng)
    integers = lambda values, dtype: torch.tensor(values, dtype=dtype).to(device)
    same = rng.random() < 0.5
    a: dict = {}
    packed = rng.random() < 0.35
    if packed:
        count = rng.randint(0 if op == "attention" else 1, 4)
        lengths = [rng.randint(0, largest) for _ in range(count)]
        lengths_k = lengths if same else [rng.randint(0, largest) for _ in range(count)]
        sums = lambda values: [sum(values[:n]) for n in range(len(values) + 1)]
        sq, sk, rows, batch = sum(lengths), sum(lengths_k), count, ()
        if op != "rope":
            a["cu_seqlens"] = integers(sums(lengths), torch.int32)
            if not same or rng.random() < 0.3:
                a["cu_seqlens_k"] = integers(sums(lengths_k), torch.int32)
            if rng.random() < 0.3:
                a["max_seqlen"] = max(lengths, default=0)
    else:
        rows = rng.choice((0, 1, 1, 2, 2, 3))
        sq = rng.randint(0, largest)
        sk, batch = sq if same else rng.randint(0, largest), (rows,)
    a |= dict(q=randn(*batch, sq, heads, head_dim), k=randn(*batch, sk, kv_heads, head_dim))
    if op != "rope":
        a["v"] = randn(*batch, sk, kv_heads, head_dim)
        shapes = [(heads,), (heads, head_dim), (rows, heads, 1), (rows, heads, head_dim), (1, heads, head_dim)]
        if rng.random() < 0.7:
            a["scale"] = randn(*rng.choice([*shapes, (rows, heads)]), dtype=statistics)
        if rng.random() < 0.3:
            a["offset"] = randn(*rng.choice([shapes[1], shapes[3], shapes[4]]), dtype=statistics)
        a["causal"] = rng.random() < 0.6
        if rng.random() < 0.3:
            a["window"] = rng.choice((1, 2, 3, 5, 2**20, 2**31, 2**40))
        own = random.Random(generator.initial_seed())  # so that the other draws of a seed stay what they were
        if own.random() < 0.3:
            a.update(causal=True, window=None, mask=random_mask(own, kv_heads, heads // kv_heads))
        if listed and not packed:
            size = of_blocks.choice((32, 32, 64, 128))
            blocks = [-(-n // size) for n in (sq, sk)]
            shape = (of_blocks.choice((1, rows)), of_blocks.choice((1, heads)), *blocks)
            share = of_blocks.choice((0.0, 0.3, 0.7, 1.0))
            drawn = torch.Generator().manual_seed(of_blocks.getrandbits(32))
            a |= dict(blocks=(torch.rand(shape, generator=drawn) < share).to(device), block_size=size)
            if of_blocks.random() < 0.5:
                a["blocks"] = scattered(a["blocks"], of_blocks)
        if rng.random() < 0.3:
            a["softmax_scale"] = rng.choice((0.3, 1.0, -0.5, 0.0))
        a["deterministic"] = rng.random() < 0.3
    if op != "attention":
        half = rng.randint(1, head_dim // 2)
        length = max(sq, sk, 1) + rng.randint(0, 3)
        at = lambda n: [rng.randrange(length) for _ in range(n)]
        integer = rng.choice((torch.int32, torch.int64))
        a |= dict(interleaved=rng.random() < 0.4, positions=None)
        shape = (length, half)
        if packed or rng.random() < 0.5:
            each_row = not packed and rng.random() < 0.5
            a["positions"] = (
                integers([at(sq) for _ in range(rows)], integer).view(rows, sq)
                if each_row
                else integers(at(sq), integer)
            )
            if sq != sk or rng.random() < 0.3:
                a["positions_k"] = integers(at(sk), rng.choice((torch.int32, torch.int64)))
        elif sq == sk and rng.random() < 0.5:
            shape = (rng.choice((1, rows)), sq, half)
        angle = torch.rand(shape, generator=generator) * 6
        table = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
        a |= dict(
            cos=scattered(angle.cos().to(table).to(device), rng), sin=scattered(angle.sin().to(table).to(device), rng)
        )
    if op == "rope":
        a["inverse"] = rng.random() < 0.3
    return op, a


def spoil(a: dict, rng: random.Random) -> None:
    """Changes one argument into something that is usually wrong."""
    own = apart(rng, "lists")
    if "v" in a and own.random() < 0.1:  # packed sequences take none, and few calls this map or these sizes
        one = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=a["q"].device)
        a.update(own.choice((dict(blocks=one), dict(blocks=one, block_size=own.choice((0, 48, 1 << 21))))))
        return
    name = rng.choice([n for n, t in a.items() if isinstance(t, torch.Tensor)])
    t = a[name]

    def resize():
        if t.dim():
            d = rng.randrange(t.dim())
            packed = a.get("cu_seqlens") is not None and t.device.type != "cpu"
            if packed and (name.startswith("cu_") or (name in ("q", "k", "v") and d == 0)):
                return  # the host does not read cu_seqlens on a GPU (docs/ops.md), so nobody can know
            a[name] = torch.cat((t, t), d) if rng.random() < 0.5 else t.narrow(d, 0, max(0, t.shape[d] - 1))

    def number():
        wrong = (
            dict(window=0),
            dict(window=-3),
            dict(mask=[0] * 7),
            dict(mask=[1, 0, *[0] * 6]),
            dict(mask=[0] * 8, causal=False),
            dict(softmax_scale=math.nan),
            dict(softmax_scale=-math.inf),
            dict(max_seqlen=-1),
            dict(max_seqlen=2),
            dict(max_seqlen_k=10**6),
        )
        a.update(rng.choice(wrong) if "v" in a else dict(backend="fastest"))

    def contents():
        if name.startswith(("cu_", "positions")) and t.device.type == "cpu":
            a[name] = t + rng.choice((-1, 1, 1000))
        elif "cu_seqlens" in a and t.device.type == "cpu":
            a["cu_seqlens"] = a["cu_seqlens"].flip(0)
        elif "cos" in a:
            a["positions_k"] = torch.zeros(3, dtype=torch.int64)

    rng.choice(
        (
            resize,
            resize,
            number,
            contents,
            lambda: a.update({name: t.to(rng.choice(OTHER_DTYPES))}),
            lambda: a.update({name: t[None]}),
            lambda: a.update({name: t.flatten()}),
            lambda: a.update({name: t.to("meta")}),
            lambda: a.update({name: t.to_sparse()}),
            lambda: a.update({name: None}) if name not in ("q", "k", "v", "cos", "sin") else None,
        )
    )()


def describe(op: str, a: dict) -> str:
    def kind(t):
        if not isinstance(t, torch.Tensor):
            return t
        strides = f"strides {t.stride()}" if t.layout == torch.strided else t.layout
        return f"{str(t.dtype)[6:]}{list(t.shape)} on {t.device} {strides}"

    return f"{op}({', '.join(f'{n}={kind(t)}' for n, t in a.items())})"


def assert_cells(
    name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float, heads_at: int, what: str, floor: float = 0.0
) -> None:
    """`floor`: the size of what cancels in an element, for results that may vanish (one key: grad_q is 0 exactly)."""
    assert got.shape == want.shape, f"{name} has shape {list(got.shape)}, not {list(want.shape)}: {what}"
    got, want = got.detach().double(), want.detach()
    alive = want.isfinite()
    assert torch.equal(got.isfinite(), alive), f"{name} is not finite exactly where it should be: {what}"
    if not want.numel():
        return
    got, want = (torch.where(alive, t, 0.0).movedim(heads_at, 1 if t.dim() > 3 else 0) for t in (got, want))
    kept = (0, 1) if want.dim() > 3 else (0,)
    other = [d for d in range(want.dim()) if d not in kept]
    norm = lambda t: t.square().sum(other).sqrt() if other else t.abs()
    size = norm(want)
    floor *= math.sqrt(want.numel() / size.numel())
    error = norm(got - want) / (size + size.mean() + floor + 1e-30)
    assert error.max() <= tolerance, (
        f"{name}: relative error {error.max():.1e} in a cell, allowed {tolerance:.0e}: {what}"
    )


def one_line(op: str, error: Exception, what: str) -> None:
    assert isinstance(error, (ValueError, NotImplementedError)), (
        f"{type(error).__name__} instead of a sentence: {error}: {what}"
    )
    text = str(error)
    assert text.startswith(f"seal::{op}: ") and "\n" not in text and ", got " in text, f"no sentence: {text}: {what}"


def run_one(seed: str, backend: str, device: torch.device) -> bool:
    """One call; whether it was answered by a result."""
    rng = random.Random(seed)
    op, a = random_call(rng, backend, device)
    if rng.random() < 0.4:
        spoil(a, rng)
    names = [n for n in ("q", "k", "v", "scale", "offset") if isinstance(a.get(n), torch.Tensor) and rng.random() < 0.8]
    call = {n: t.detach().requires_grad_() if n in names and t.is_floating_point() else t for n, t in a.items()}
    names = [n for n in names if isinstance(call[n], torch.Tensor) and call[n].requires_grad]
    what = f"seed {seed}: {describe(op, a)}"
    try:
        outputs = getattr(torch.ops.seal, op)(**{"backend": backend, **call})[:2]
    except Exception as error:
        one_line(op, error, what)
        return False
    exact = {
        n: t.detach().double().requires_grad_(n in names)
        if n in ("q", "k", "v", "scale", "offset") and t is not None
        else t
        for n, t in a.items()
    }
    wanted = by_hand(op, {"positions": None, **exact})
    dtype = a["q"].dtype
    tolerance, of_gradients = TOLERANCE[dtype]
    for name, got, want in zip(("out", "lse") if op != "rope" else ("q", "k"), outputs, wanted):
        assert_cells(name, got, want, tolerance, -2, what)  # heads come last but one in [.., heads, tokens], too
    if not names:
        return True
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    cotangents = [torch.randn(t.shape, generator=generator).to(t.dtype).to(device) for t in outputs]
    used = [n for n in range(2) if outputs[n].requires_grad and (n == 0 or op == "rope" or rng.random() < 0.5)]
    if not used:
        return True
    seed_of = lambda n, t: torch.where(torch.isfinite(t.detach()), cotangents[n].to(t.dtype), 0.0)
    got = torch.autograd.grad(
        [outputs[n] for n in used],
        [call[n] for n in names],
        [scattered(cotangents[n], rng) for n in used],
        allow_unused=True,
    )
    known = [n for n in used if wanted[n].requires_grad]  # a call without a row has constant results
    want = (
        torch.autograd.grad(
            [wanted[n] for n in known],
            [exact[n] for n in names],
            [seed_of(n, wanted[n]) for n in known],
            allow_unused=True,
        )
        if known
        else [None] * len(names)
    )
    sigma = a.get("softmax_scale") if a.get("softmax_scale") is not None else a["q"].shape[-1] ** -0.5
    cancels = 0.1 * max(1.0, abs(sigma) * math.sqrt(a["q"].shape[-1]))
    for n, x, y in zip(names, got, want):
        if y is None or x is None:
            assert (y is None or not y.any()) and (x is None or not x.any()), f"grad_{n}: {x} instead of {y}: {what}"
        elif n in ("q", "k", "v"):
            assert_cells(f"grad_{n}", x, y, of_gradients, -2, what, 0.0 if n == "v" else cancels)
        else:
            assert_cells(f"grad_{n}", x, y, of_gradients, 0 if y.dim() < 2 else -2 if y.dim() == 3 else 0, what)
    return True


@pytest.fixture
def supported(backend, device):
    if (
        reason := why_not(backend, "attention", device, torch.float32 if backend != "cuda" else torch.float16, 16)
    ) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("chunk", range(20))
def test_a_random_call_is_right_or_refused(backend, device, supported, chunk):
    if chunk >= chunks(backend, device):
        pytest.skip("fewer calls on this backend")
    calls = CHUNK if device.type == "cuda" or backend != "triton" else 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, in Triton's interpreter
        answered = sum(run_one(f"{backend}-{chunk}-{n}", backend, device) for n in range(calls))
    assert calls * 0.4 <= answered < calls, f"{answered} of {calls} calls gave a result: both kinds are to be tried"


def test_the_call_that_found_a_layout_of_one_channel():
    """A channel added to a single one, for the gradient into the log-sum-exp, was laid out apart from it."""
    assert run_one("cal-cpu-504", "cpu", torch.device("cpu"))
