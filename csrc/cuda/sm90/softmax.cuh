// Online softmax over the rows of a wgmma accumulator. Thread layout as in wgmma.cuh: a thread holds two rows,
// l / 4 and l / 4 + 8 of its warp's 16, and of each block of keys the columns 8 j + 2 (l % 4) + {0, 1}.
#pragma once

#include "wgmma.cuh"

namespace seal::sm90 {

// `value`, but computed after `earlier`. ptxas puts independent instructions in an order of its own, in which less of the
// softmax overlaps with the products; this dependence holds it to ours. `zero` is 0 at run time, which ptxas cannot know.
SEAL_DEVICE float after(float earlier, uint32_t zero, float value) {
  return __uint_as_float(__float_as_uint(value) | (__float_as_uint(earlier) & zero));
}

// The running maximum follows the scores' with some slack, so that earlier results rarely have to be rescaled: exponentials are at
// most 2^kSlack, which neither fp32 sums nor 16-bit exponentials mind, and everything is divided by the sum in the end.
struct OnlineSoftmax {
  static constexpr float kSlack = 8.f;

  float scale_log2;  // softmax_scale * log2(e), > 0
  float max[2];      // what a row's exponents are taken from: a raw score, equal in the row's four lanes
  float sum[2];      // of this lane's columns only, until finish()

  SEAL_DEVICE explicit OnlineSoftmax(float scale_log2) : scale_log2(scale_log2) {
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0.f;
  }

  // What is subtracted from the exponents of a row; any finite number where no key has been seen yet.
  template <bool kMasked>
  SEAL_DEVICE float base(float top) const {
    return (kMasked && top == -INFINITY ? 0.f : top) * scale_log2;
  }

  // Raises the running maximum of one of the thread's two rows where a block of scores exceeds it by more than the slack;
  // `rescale` is what earlier results of the row must be multiplied by. kMasked: scores may be -inf. Runs after `earlier`;
  // returns a value that is there when the thread's own scores have been looked through.
  template <bool kMasked, int kAcc>
  SEAL_DEVICE float raise_maximum(int row, const float (&scores)[kAcc], float& rescale, float earlier, uint32_t zero) {
    float high[2] = {after(earlier, zero, max[row]), scores[2 * row]};  // two partial maxima: shorter dependent chains
#pragma unroll
    for (int i = 1; i < kAcc / 2; ++i) high[i % 2] = fmaxf(high[i % 2], scores[i / 2 * 4 + 2 * row + i % 2]);
    const float own = fmaxf(high[0], high[1]);
    float top = fmaxf(own, __shfl_xor_sync(0xffffffffu, own, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    const float rise = (top - max[row]) * scale_log2;
    const bool raised = rise > kSlack;  // not where both are -inf
    rescale = raised ? exp2_approx(-rise) : 1.f;
    if (raised) max[row] = top;
    return own;
  }

  // Then turns the row's scores into exp2(scale_log2 * (score - running maximum)) and adds them up.
  template <bool kMasked, int kAcc>
  SEAL_DEVICE void exponentiate(int row, float (&scores)[kAcc], float rescale) {
    const float subtrahend = base<kMasked>(max[row]);
    float partial[2] = {sum[row] * rescale, 0.f};
#pragma unroll
    for (int i = 0; i < kAcc / 2; ++i) {
      float& score = scores[i / 2 * 4 + 2 * row + i % 2];
      score = exp2_approx(fmaf(score, scale_log2, -subtrahend));
      partial[i % 2] += score;
    }
    sum[row] = partial[0] + partial[1];
  }

  // Completes the sums; gives 1 / sum (0 for a row without keys) and the natural log-sum-exp of the scaled scores.
  SEAL_DEVICE void finish(float (&inverse)[2], float (&lse)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      sum[row] += __shfl_xor_sync(0xffffffffu, sum[row], 1);
      sum[row] += __shfl_xor_sync(0xffffffffu, sum[row], 2);
      const bool empty = sum[row] == 0.f;
      inverse[row] = empty ? 0.f : __fdividef(1.f, sum[row]);
      lse[row] = empty ? -INFINITY : (max[row] * scale_log2 + log2_approx(sum[row])) * kLn2;
    }
  }
};

}  // namespace seal::sm90
