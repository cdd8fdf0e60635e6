// Online softmax over the rows of a wgmma accumulator, and the mask. Thread layout as in wgmma.cuh: a thread holds two rows,
// l / 4 and l / 4 + 8 of its warp's 16, and of each block of keys the columns 8 j + 2 (l % 4) + {0, 1}.
#pragma once

#include "wgmma.cuh"

namespace seal::sm90 {

constexpr float kLn2 = 0.69314718055994531f;

// Sets scores outside [left, right) to -inf. left and right count from the thread's first column of the block.
template <int kAcc>
SEAL_DEVICE void mask_scores(float (&scores)[kAcc], const int (&left)[2], const int (&right)[2]) {
#pragma unroll
  for (int i = 0; i < kAcc; ++i) {
    const int column = 8 * (i / 4) + i % 2, row = (i / 2) % 2;
    if (column < left[row] || column >= right[row]) scores[i] = -INFINITY;
  }
}

// 2^x for x <= 127 on the multiply-add pipe, to relieve the special function unit; relative error below 2^-13, less than
// what rounding the result to bf16 or fp16 loses. Exactly 0 for x <= -127 and -inf (the constant term is 1 for that).
SEAL_DEVICE float exp2_polynomial(float x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = fmaxf(x, -127.f);
  const float shifted = x + kRound;
  const float f = x - (shifted - kRound);  // in [-1/2, 1/2]
  const float p = fmaf(fmaf(fmaf(0.05500893f, f, 0.24221096f), f, 0.69328293f), f, 1.f);
  return __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));
}

struct OnlineSoftmax {
  float scale_log2;  // softmax_scale * log2(e), > 0
  float max[2];      // of the raw scores, equal in the four lanes of a row
  float sum[2];      // of this lane's columns only, until finish()

  SEAL_DEVICE explicit OnlineSoftmax(float scale_log2) : scale_log2(scale_log2) {
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0.f;
  }

  // Turns scores into exp2(scale_log2 * (score - running maximum)); `rescale` is what earlier results must be multiplied by.
  // One in kPolynomial exponentials avoids the special function unit; 0: none.
  template <int kPolynomial, int kAcc>
  SEAL_DEVICE void update(float (&scores)[kAcc], float (&rescale)[2]) {
    float high[4];  // two partial maxima a row: shorter dependent chains
#pragma unroll
    for (int i = 0; i < 4; ++i) high[i] = scores[i];
#pragma unroll
    for (int i = 4; i < kAcc; ++i) high[i % 4] = fmaxf(high[i % 4], scores[i]);
    float base[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float top = fmaxf(max[row], fmaxf(high[2 * row], high[2 * row + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      base[row] = (top == -INFINITY ? 0.f : top) * scale_log2;  // no key seen yet: any finite number
      rescale[row] = exp2_approx(fmaf(max[row], scale_log2, -base[row]));
      max[row] = top;
    }
    float partial[4] = {sum[0] * rescale[0], 0.f, sum[1] * rescale[1], 0.f};
#pragma unroll
    for (int i = 0; i < kAcc; ++i) {
      const float exponent = fmaf(scores[i], scale_log2, -base[(i / 2) % 2]);
      const bool polynomial = kPolynomial > 0 && i % (kPolynomial > 0 ? kPolynomial : 1) == kPolynomial - 1;
      scores[i] = polynomial ? exp2_polynomial(exponent) : exp2_approx(exponent);
      partial[i % 4] += scores[i];
    }
    sum[0] = partial[0] + partial[1];
    sum[1] = partial[2] + partial[3];
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
