// Warpgroup matrix products: D[64 x N] (+)= A[64 x K] B[K x N], fp32 accumulators in registers, bf16 or fp16 operands, B in
// shared memory, A in shared memory or registers.
//
// Accumulator of a thread (warp w of the warpgroup, lane l): acc[4 * j + 2 * h + c] is row 16 w + l / 4 + 8 h, column
// 8 j + 2 (l % 4) + c. Columns 16 k .. 16 k + 15, packed pairwise, are the A fragment of k16 step k: acc -> A operand without
// moving data (pack_fragment).
//
// Order: wgmma_fence(); product(s); wgmma_commit(); ...; wgmma_wait<n>(). Between the first product and the wait no
// accumulator or A register of it may be touched, or ptxas serialises (C7513..C7519).
#pragma once

#include "tma.cuh"

namespace seal::sm90 {

SEAL_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SEAL_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending committed groups are in flight.
template <int kPending>
SEAL_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of `registers` across this point (an empty instruction that "writes" them).
template <int kCount>
SEAL_DEVICE void fence_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// ---- operands in shared memory

// kK: the k index runs along a row of the tile (A stored [m][k], B stored [n][k]).
// kMN: the k index runs over rows (A stored [k][m], B stored [k][n]): the "transposed" forms, 16-bit types only.
enum class Major { kK, kMN };

// A tile in the slab format of tma.cuh, kRows rows to a slab, as a wgmma operand. `address` is the tile's start, or for a
// part of it: + 128 * r for rows from r on (r a multiple of 8), + s * kRows * 128 for columns from 64 s on.
template <Major kMajor, int kRows>
class Operand {
 public:
  SEAL_DEVICE explicit Operand(uint32_t address) : low_(warp_uniform(((address & 0x3ffff) >> 4) | (kLeading << 16))) {}
  SEAL_DEVICE explicit Operand(const void* tile) : Operand(smem_address(tile)) {}

  // From an address that is warp-uniform already: no shuffle.
  static SEAL_DEVICE Operand at_uniform(uint32_t address) {
    Operand operand;
    operand.low_ = ((address & 0x3ffff) >> 4) | (kLeading << 16);
    return operand;
  }

  // The descriptor of k16 step `step`.
  SEAL_DEVICE uint64_t at(int step) const {
    constexpr int kStepsPerSlab = kSlabColumns / 16;
    const int bytes = kMajor == Major::kK ? (step / kStepsPerSlab) * kRows * kSlabRowBytes + (step % kStepsPerSlab) * 32
                                          : step * 16 * kSlabRowBytes;
    return (static_cast<uint64_t>(kStride | kSwizzle128) << 32) | (low_ + bytes / 16);
  }
  // The same operand `bytes` further on (next pipeline stage, other rows).
  SEAL_DEVICE Operand advanced(uint32_t bytes) const {
    Operand other = *this;
    other.low_ += bytes / 16;
    return other;
  }

 private:
  Operand() = default;

  // Units of 16 bytes. Stride offset: 8 rows, 1024 bytes. Leading offset: from slab to slab along m or n; unused for kK.
  static constexpr uint32_t kLeading = kMajor == Major::kMN ? kRows * kSlabRowBytes / 16 : 1;
  static constexpr uint32_t kStride = 1024 / 16;
  static constexpr uint32_t kSwizzle128 = 1u << 30;

  uint32_t low_;  // address and leading offset; the upper half is constant, and no sum carries into it
};

// ---- single instructions: wgmma.mma_async.m64nNk16

template <class T, int kN>
struct Wgmma;  // ss<trans_a, trans_b>(acc, desc_a, desc_b, accumulate), rs<trans_b>(acc, a, desc_b, accumulate)

// Text and constraints of accumulator registers, in groups of eight.
#define SEAL_T0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define SEAL_T1 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define SEAL_T2 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define SEAL_T3 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define SEAL_T4 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define SEAL_T5 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define SEAL_T6 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define SEAL_T7 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define SEAL_T8 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define SEAL_T9 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define SEAL_T10 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define SEAL_T11 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define SEAL_T12 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define SEAL_T13 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define SEAL_T14 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define SEAL_T15 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define SEAL_TEXT32 SEAL_T0 SEAL_T1 SEAL_T2 SEAL_T3
#define SEAL_TEXT40 SEAL_TEXT32 SEAL_T4
#define SEAL_TEXT64 SEAL_TEXT40 SEAL_T5 SEAL_T6 SEAL_T7
#define SEAL_TEXT128 SEAL_TEXT64 SEAL_T8 SEAL_T9 SEAL_T10 SEAL_T11 SEAL_T12 SEAL_T13 SEAL_T14 SEAL_T15
#define SEAL_R(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SEAL_REGS32(d) SEAL_R(d, 0), SEAL_R(d, 8), SEAL_R(d, 16), SEAL_R(d, 24)
#define SEAL_REGS40(d) SEAL_REGS32(d), SEAL_R(d, 32)
#define SEAL_REGS64(d) SEAL_REGS40(d), SEAL_R(d, 40), SEAL_R(d, 48), SEAL_R(d, 56)
#define SEAL_REGS128(d)                                                                                         \
  SEAL_REGS64(d), SEAL_R(d, 64), SEAL_R(d, 72), SEAL_R(d, 80), SEAL_R(d, 88), SEAL_R(d, 96), SEAL_R(d, 104), \
      SEAL_R(d, 112), SEAL_R(d, 120)

// I0.. are the operand numbers that follow the accumulators (ss: a, b, accumulate, trans a, trans b; rs: a0..a3, b, ...).
#define SEAL_WGMMA_TYPE(T, TYPE, N, REGS, I0, I1, I2, I3, I4, I5, I6)                                                             \
  template <>                                                                                                                     \
  struct Wgmma<T, N> {                                                                                                            \
    template <int kTransA, int kTransB>                                                                                           \
    static SEAL_DEVICE void ss(float (&d)[REGS], uint64_t a, uint64_t b, int accumulate) {                                        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
                   " {" SEAL_TEXT##REGS "}, %" #I0 ", %" #I1 ", p, 1, 1, %" #I3 ", %" #I4 ";\n}\n"                                \
                   : SEAL_REGS##REGS(d)                                                                                           \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(kTransA), "n"(kTransB));                                                \
    }                                                                                                                             \
    template <int kTransB>                                                                                                        \
    static SEAL_DEVICE void rs(float (&d)[REGS], const uint32_t* a, uint64_t b, int accumulate) {                                 \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
                   " {" SEAL_TEXT##REGS "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", p, 1, 1, %" #I6 ";\n}\n"          \
                   : SEAL_REGS##REGS(d)                                                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransB));                          \
    }                                                                                                                             \
  };
#define SEAL_WGMMA(N, REGS, ...)                                    \
  SEAL_WGMMA_TYPE(__nv_bfloat16, "bf16", N, REGS, __VA_ARGS__)      \
  SEAL_WGMMA_TYPE(__half, "f16", N, REGS, __VA_ARGS__)

SEAL_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
SEAL_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
SEAL_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
SEAL_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

// ---- whole products over kK columns (a multiple of 16)

// acc (+)= A B with both operands in shared memory; overwrites acc where `accumulate` is false.
template <class T, int kK, Major kMajorA, int kRowsA, Major kMajorB, int kRowsB, int kAcc>
SEAL_DEVICE void product(float (&acc)[kAcc], Operand<kMajorA, kRowsA> a, Operand<kMajorB, kRowsB> b, bool accumulate) {
#pragma unroll
  for (int step = 0; step < kK / 16; ++step) {
    Wgmma<T, 2 * kAcc>::template ss<kMajorA == Major::kMN, kMajorB == Major::kMN>(acc, a.at(step), b.at(step), accumulate || step > 0);
  }
}

// The descriptor of k16 step `step`, made at this place: hoisted out of a loop, the descriptors of all steps of all resident
// operands do not fit in the uniform registers.
template <Major kMajor, int kRows>
SEAL_DEVICE uint64_t descriptor_of(const Operand<kMajor, kRows>& operand, int step) {
  const uint64_t first = operand.at(0);
  uint32_t low;
  asm volatile("add.u32 %0, %1, %2;" : "=r"(low) : "r"(static_cast<uint32_t>(first)), "r"(static_cast<uint32_t>(operand.at(step) - first)));
  return (first & 0xffffffff00000000u) | low;
}

// product() with such descriptors: slower by their instructions, for kernels that are short of uniform registers.
template <class T, int kK, Major kMajorA, int kRowsA, Major kMajorB, int kRowsB, int kAcc>
SEAL_DEVICE void lean_product(float (&acc)[kAcc], Operand<kMajorA, kRowsA> a, Operand<kMajorB, kRowsB> b, bool accumulate) {
#pragma unroll
  for (int step = 0; step < kK / 16; ++step) {
    Wgmma<T, 2 * kAcc>::template ss<kMajorA == Major::kMN, kMajorB == Major::kMN>(acc, descriptor_of(a, step), descriptor_of(b, step),
                                                                                 accumulate || step > 0);
  }
}

// acc (+)= A B with A in registers: four per k16 step, as pack_fragment makes them.
template <class T, Major kMajorB, int kRowsB, int kAcc, int kA>
SEAL_DEVICE void product(float (&acc)[kAcc], const uint32_t (&a)[kA], Operand<kMajorB, kRowsB> b, bool accumulate) {
#pragma unroll
  for (int step = 0; step < kA / 4; ++step) {
    Wgmma<T, 2 * kAcc>::template rs<kMajorB == Major::kMN>(acc, a + 4 * step, b.at(step), accumulate || step > 0);
  }
}

// Rounds an accumulator to the A operand of a following product (its columns become the k index).
template <class T, int kAcc>
SEAL_DEVICE void pack_fragment(uint32_t (&a)[kAcc / 2], const float (&acc)[kAcc]) {
#pragma unroll
  for (int i = 0; i < kAcc / 2; ++i) a[i] = pack<T>(acc[2 * i], acc[2 * i + 1]);
}

}  // namespace seal::sm90
