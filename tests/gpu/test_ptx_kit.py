"""The PTX kit piece by piece on a Hopper GPU: every form of matrix operand, tensor copies with their bounds, stmatrix
and the bulk reduction, each against a few lines of PyTorch. Builds ptx_kit.cu with nvcc (seconds); skipped without GPU
or nvcc.
"""

import ctypes
import functools
import pathlib
import shutil
import subprocess
import tempfile

import pytest
import torch

HERE = pathlib.Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
]


@functools.cache
def kit() -> ctypes.CDLL:
    library = pathlib.Path(tempfile.mkdtemp()) / "ptx_kit.so"
    subprocess.run(
        [
            "nvcc",
            "-std=c++17",
            "-gencode=arch=compute_90a,code=sm_90a",
            "-O2",
            "-Xcompiler",
            "-fPIC",
            "-shared",
            f"-I{HERE.parents[1] / 'csrc'}",
            "-o",
            library,
            HERE / "ptx_kit.cu",
        ],
        check=True,
    )
    return ctypes.CDLL(str(library))


def pointer(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def succeed(status: int) -> None:
    torch.cuda.synchronize()
    assert status == 0, f"CUDA error {status}"


def test_products():
    rows = (ctypes.c_int * 500)()
    count = kit().kit_products(rows)
    assert count > 15
    for index in range(count):
        n, k, a_source, b_major, half = rows[5 * index : 5 * index + 5]
        dtype = torch.float16 if half else torch.bfloat16
        a, b = torch.randn(64, k, device="cuda", dtype=dtype), torch.randn(k, n, device="cuda", dtype=dtype)
        stored_a = a.T.contiguous() if a_source == 1 else a
        stored_b = b if b_major == 1 else b.T.contiguous()
        c = torch.full((64, n), float("nan"), device="cuda")
        succeed(kit().kit_product(index, pointer(stored_a), pointer(stored_b), pointer(c)))
        expected = a.double() @ b.double()
        error = (c - expected).norm() / expected.norm()
        assert error < 1e-5, (
            f"N {n} K {k} A {('K', 'MN', 'registers')[a_source]} B {('K', 'MN')[b_major]} {dtype}: {error:.2e}"
        )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_copies_end_with_the_sequence(packed, head_dim):
    """Rows past the sequence's end arrive as zeros and are not stored; so do columns past head_dim."""
    box, heads, lengths = 32, 3, [50, 7, 0, 90]
    rows = sum(lengths) if packed else lengths[0]
    batch = 1 if packed else len(lengths)
    source = torch.randn(batch, rows, heads, head_dim, device="cuda").bfloat16()
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for sequence, length in enumerate(lengths if packed else lengths[:1] * batch):
        first = starts[sequence] if packed else sequence
        for row in (0, 5, 32, 49):
            for column in range(0, head_dim, 64):
                target = torch.full_like(source, float("nan"))
                seen = torch.full((box, 64), float("nan"), device="cuda").bfloat16()
                succeed(
                    kit().kit_copy(
                        pointer(source),
                        pointer(target),
                        batch,
                        rows,
                        heads,
                        head_dim,
                        packed,
                        row,
                        1,
                        column,
                        length,
                        first,
                        pointer(seen),
                    )
                )
                there, width = max(0, min(box, length - row)), min(64, head_dim - column)
                begin = (first if packed else 0) + row
                where = (0 if packed else sequence, slice(begin, begin + there), 1, slice(column, column + width))
                expected = torch.zeros_like(seen)
                expected[:there, :width] = source[where]
                assert torch.equal(seen, expected)
                assert torch.equal(target[where], source[where])
                target[where] = float("nan")
                assert target.isnan().all()


def test_stmatrix_and_bulk_reduction():
    matrix = torch.randint(0, 1000, (16, 16), device="cuda", dtype=torch.int16)
    plain, transposed = torch.zeros_like(matrix), torch.zeros_like(matrix)
    total = torch.ones(16, 16, device="cuda")
    succeed(kit().kit_small(pointer(matrix), pointer(plain), pointer(transposed), pointer(total)))
    assert torch.equal(plain, matrix)
    assert torch.equal(transposed, matrix.T)
    assert torch.equal(total, 1 + matrix.float())
