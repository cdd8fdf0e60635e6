"""The models and lengths of `seal bench --suite training`."""

from __future__ import annotations

import argparse
import dataclasses

SUITE = "training"
LABELS = 512  # tokens at the end of a sample that are trained


@dataclasses.dataclass(frozen=True)
class Size:
    """A random Llama of these sizes, and the lengths it is trained at.

    ``runs``: (tokens, layers that are run); where these are fewer than ``layers``, the seconds of all are extrapolated.
    """

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    layers: int
    runs: tuple[tuple[int, int], ...]

    def config(self, layers: int, length: int):
        """Of transformers."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden, intermediate_size=self.inner, num_hidden_layers=layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, vocab_size=self.vocabulary,
            max_position_embeddings=length, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        )  # fmt: skip

    def step_operations(self, length: int, layers: int) -> float:
        """Operations that a step needs: forward, the gradient through frozen products, attention backward at 2.5 times
        its forward; nothing that is recomputed."""
        head_dim = self.hidden // self.heads
        weights = 2 * self.hidden**2 + 2 * self.hidden * self.kv_heads * head_dim + 3 * self.hidden * self.inner
        attention = 4 * self.hidden * length**2 / 2
        head = 2 * self.hidden * self.vocabulary * min(LABELS, length // 2)
        return layers * (2 * 2 * weights * length + 3.5 * attention) + 2 * head


_K = 1024
SIZES = {
    "8b": Size(
        4096, 14336, 32, 8, 128_256, 32,
        ((31_744, 32), (128 * _K, 32), (256 * _K, 32), (512 * _K, 32), (1024 * _K, 4)),
    ),
    "tiny": Size(64, 128, 4, 2, 101, 4, ((64, 4), (128, 2))),
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this suite."""
    parser.add_argument(
        "--training-model", choices=SIZES, help="suite training: sizes of the model (8b on a GPU, tiny on a CPU)"
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="suite training: only these of the model's lengths")
    parser.add_argument(
        "--steps", type=int, default=2, help="suite training: timed steps, after one that is not; 0 times the first"
    )
    parser.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="suite training: run N of the layers, and extrapolate the seconds",
    )
