"""Inputs at the very start and the very end of mapped device memory: a kernel that touches anything beside them faults.

The caching allocator hides such accesses, because a tensor mostly has mapped neighbours. Here every input lies in a
mapping of its own with address ranges on both sides that are reserved and not mapped. A copy engine's box that holds no
row of its tensor
is such an access: the hardware translates its address although it transfers nothing.
"""

import ctypes

import pytest
import torch
from cases import Case, gradients_of, make

import seal_ops
from seal_ops import rope_frequencies, rope_tables
from seal_ops.ops.dispatch import why_not


class _Properties(ctypes.Structure):  # CUmemAllocationProp: pinned memory of device `id`
    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", ctypes.c_int),
        ("id", ctypes.c_int),
        ("metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class _Access(ctypes.Structure):  # CUmemAccessDesc: read and write from device `id`
    _fields_ = [("location", ctypes.c_int), ("id", ctypes.c_int), ("flags", ctypes.c_int)]


class Mappings:
    """Device memory with nothing mapped before and after it."""

    def __init__(self):
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.properties = _Properties(1, 0, 1, torch.cuda.current_device(), None, (ctypes.c_ubyte * 8)())
        granularity = ctypes.c_size_t()
        self.call(
            "cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(self.properties), ctypes.c_int(0)
        )
        self.granularity = granularity.value
        self.made = []

    def call(self, name, *arguments):
        status = getattr(self.driver, name)(*arguments)
        assert status == 0, f"{name}: CUDA driver error {status}"

    def allocate(self, size: int) -> int:
        """Address of `size` bytes, a multiple of the granularity, with a megabyte and more unmapped on both sides."""
        u64 = ctypes.c_uint64
        reserved, handle, guard = u64(), u64(), u64(self.granularity)
        self.call("cuMemAddressReserve", ctypes.byref(reserved), u64(size + 2 * guard.value), u64(0), u64(0), u64(0))
        self.call("cuMemCreate", ctypes.byref(handle), u64(size), ctypes.byref(self.properties), u64(0))
        start = u64(reserved.value + guard.value)
        self.call("cuMemMap", start, u64(size), u64(0), handle, u64(0))
        access = _Access(1, self.properties.id, 3)
        self.call("cuMemSetAccess", start, u64(size), ctypes.byref(access), u64(1))
        self.made.append((reserved, size, start, handle))
        return start.value

    def place(self, tensor: torch.Tensor, side: str) -> torch.Tensor:
        """A contiguous copy of `tensor` whose first byte is the first of a mapping ("start"), or whose last is the last
        ("end")."""
        needed = tensor.numel() * tensor.element_size()
        size = -(-needed // self.granularity) * self.granularity
        address = self.allocate(size) + (size - needed if side == "end" else 0)
        memory = type(
            "Memory",
            (),
            {
                "__cuda_array_interface__": {
                    "shape": (needed,),
                    "typestr": "|u1",
                    "data": (address, False),
                    "version": 2,
                }
            },
        )()
        placed = torch.as_tensor(memory, device="cuda").view(tensor.dtype).view(tensor.shape)
        assert placed.data_ptr() == address
        return placed.copy_(tensor)

    def free(self):
        u64 = ctypes.c_uint64
        for reserved, size, start, handle in self.made:
            self.call("cuMemUnmap", start, u64(size))
            self.call("cuMemRelease", handle)
            self.call("cuMemAddressFree", reserved, u64(size + 2 * self.granularity))


@pytest.fixture
def mappings(device):
    torch.zeros(1, device=device)  # makes the context current
    found = Mappings()
    yield found
    torch.cuda.synchronize()
    found.free()


CASES = [
    Case((1,) * 9, (1,) * 9, heads=(6, 1), head_dim=128, scale="head", offset=True),
    Case((1023, 3), (1023, 3), heads=(6, 2), head_dim=256, scale=None),
    Case((70, 0, 65, 1), (0, 65, 70, 1), heads=(4, 2), scale="channel"),
    Case((3, 129, 0), (200, 1, 5), heads=(4, 4), head_dim=128, causal=False),
    Case((130, 5), (130, 5), heads=(2, 1), head_dim=160, window=9),
    Case((65, 66), (65, 66), heads=(2, 2), head_dim=96),
    Case(1, 1, heads=(4, 2), batch=3),
    Case(113, 203, heads=(6, 2), batch=2, scale="channel", offset=True),
    Case(203, 113, heads=(4, 1), head_dim=128, scale="head"),
    Case(129, 129, heads=(4, 4), head_dim=256, causal=False),
    Case(217, 217, heads=(2, 2), head_dim=160, batch=2),
]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("side", ["start", "end"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(backend, device, mappings, case, side, deterministic):
    reason = why_not(backend, "attention_backward", device, torch.bfloat16, case.head_dim)
    if reason:
        pytest.skip(reason)
    inputs = make(case, torch.bfloat16, device)
    grad_out, _ = gradients_of(case, inputs)

    def results(place):
        leaves = {
            n: place(inputs[n]).requires_grad_() for n in ("q", "k", "v", "scale", "offset") if inputs[n] is not None
        }
        out, lse = seal_ops.attention(
            **{**inputs, **leaves}, deterministic=deterministic, return_lse=True, backend=backend
        )
        return out.detach(), lse.detach(), *torch.autograd.grad(out, list(leaves.values()), place(grad_out))

    for got, want in zip(results(lambda t: mappings.place(t, side)), results(torch.clone)):
        if deterministic:
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(
                got, want, rtol=1e-2, atol=1e-2 * float(want[want.isfinite()].abs().amax()) if want.numel() else 0
            )


@pytest.mark.parametrize("side", ["start", "end"])
@pytest.mark.parametrize("head_dim, rotary", [(64, 64), (128, 128), (80, 32), (256, 256)])
def test_rope(backend, device, mappings, head_dim, rotary, side):
    q, k = (torch.randn(2, 113, heads, head_dim, device=device).bfloat16() for heads in (5, 1))
    cos, sin = rope_tables(113, rope_frequencies(rotary)[0], device=device)
    want = seal_ops.rope(q, k, cos, sin, backend=backend)
    got = seal_ops.rope(*(mappings.place(t, side) for t in (q, k, cos, sin)), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
