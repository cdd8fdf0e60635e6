"""The samples of a plan are launched as real rows are: the kernels' rule, on sizes where the two differ otherwise."""

import pathlib
import types

import pytest
import torch
from families import FAMILIES

import seal_ops
from seal_ops.huggingface.modes import mode
from seal_ops.ops import launch_overrides
from seal_ops.ops.launch_overrides import enough_thread_blocks, key_tiles, launched_as
from seal_ops.training.memory_plan.planning import Planner
from seal_ops.training.memory_plan.short_samples import ShortSamples

LAUNCH = pathlib.Path(__file__).parents[2] / "csrc" / "cuda" / "sm90"
CUDA = torch.device("cuda")


def heads_of_a_block(tiles: int, kv_heads: int, group: int, enough: int) -> int:
    """csrc/cuda/sm90/attention_backward.cu: query heads of a thread block; `group` divided by it partial sums."""
    most = 1
    for heads in range(2, min(group, 32) + 1):
        if group % heads == 0 and tiles * kv_heads * (group // heads) >= enough:
            most = heads
    return most


class Built:
    """Stands for the extension, on a GPU of 132 multiprocessors."""

    def __init__(self):
        self.enough, self.calls = 0, []

    def set_launch_overrides(self, *, enough_ctas=0, sms=0):
        assert sms == 0
        self.enough = enough_ctas
        self.calls.append(enough_ctas)

    def heads(self, tiles, kv_heads, group):
        return heads_of_a_block(tiles, kv_heads, group, self.enough or enough_thread_blocks(132))


@pytest.fixture
def built(monkeypatch):
    found = Built()
    monkeypatch.setattr(launch_overrides, "extension", lambda: found)
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return found


def test_the_rule_is_the_kernels():
    """What `launch_overrides` says of the launch is what the sources say."""
    source = (LAUNCH / "attention_backward.cu").read_text()
    assert "p->enough_ctas = 2 * p->multiprocessors - 8;" in source
    condition = "if (group % heads == 0 && key_tiles * (group / heads) >= p->enough_ctas)"
    assert f"{condition} p->heads_per_cta = heads;" in source
    assert "packed ? length / rows + p->batch : (length + rows - 1) / rows" in source
    assert "padded_head_dim == 256 ? 64 : kTileRows" in (LAUNCH / "backward_common.cuh").read_text()


def test_the_sizes_of_eight_billion(built):
    """As the launch, compiled for the host, said: 4 parts at 512 and 1,024 tokens, 2 at 2,048, 1 at 4,096 and 8,192."""
    parts = [4 // built.heads(key_tiles(n, 128, 1, False), 8, 4) for n in (512, 1024, 2048, 3072, 4096, 8192)]
    assert parts == [4, 4, 2, 2, 1, 1]
    for n in (512, 1024, 2048):
        with launched_as(key_tiles(n, 128, 1, False), key_tiles(8192, 128, 1, False), CUDA):
            assert 4 // built.heads(key_tiles(n, 128, 1, False), 8, 4) == 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_sample_is_shared_out_as_the_real_rows(built, head_dim, packed):
    differ = 0
    for rows, kv_heads, group in ((1, 8, 4), (2, 2, 7), (1, 1, 12), (3, 2, 8), (1, 1, 71), (4, 8, 1)):
        for real in (700, 1_000, 2_048, 4_095, 4_096, 12_345, 131_072):
            tiles = key_tiles(real * rows, head_dim, rows, packed)
            wanted = built.heads(tiles, kv_heads, group)
            for length in (real // 4, 250, 512, 1_024, 2_048):
                sample = key_tiles(length * rows, head_dim, rows, packed)
                differ += built.heads(sample, kv_heads, group) != wanted
                with launched_as(sample, tiles, CUDA):
                    assert built.heads(sample, kv_heads, group) == wanted, (rows, kv_heads, group, real, length)
    assert differ > 20, "without it, many are not"


def test_the_device_decides_again_after_a_failure(built):
    with pytest.raises(RuntimeError), launched_as(4, 64, CUDA):
        raise RuntimeError
    assert built.calls == [16, 0]
    with launched_as(4, 64, torch.device("cpu")):
        assert built.calls == [16, 0]


@pytest.mark.parametrize("known", [True, False])
def test_all_samples_of_a_plan_are_launched_so(built, known, monkeypatch):
    """Backward passes run inside; a model whose layers are not known, too."""
    lengths = []
    monkeypatch.setattr(ShortSamples, "launched", recorded(lengths, built, ShortSamples.launched))
    backward, ran = torch.autograd.grad, []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (ran.append(built.enough), backward(*a, **k))[1])
    lm = FAMILIES["llama"].build()
    seal_ops.attach(lm, "channel")
    with mode(lm, True):
        planner = Planner(lm, 300, 16)
        samples = planner._samples
        if not known:
            planner.measurement = None
        planner.plan(1 << 40)
    first = [samples.points[0][0]] if known else []  # a process's first products
    assert lengths == first + [n for n, _ in samples.points]
    assert ran and all(enough > 0 for enough in ran)


def recorded(lengths, built, launched):
    def on_a_gpu(self, length):
        lengths.append(length)
        return launched_as(self._key_tiles(length), self._key_tiles(self.length), CUDA)

    return on_a_gpu
