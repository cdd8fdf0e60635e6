// Changes to the attention backward, for benchmarks/backward_variants.py to measure one by one. Those that are 1 are landed;
// those that are 0 wait (docs/kernel_notes_backward.md has the figures and what has run on which).
#pragma once

#ifndef SEAL_BACKWARD_FILL  // sections of as many pairs as fill the multiprocessors
#define SEAL_BACKWARD_FILL 1
#endif
#ifndef SEAL_BACKWARD_DIVISORS  // divisors of the group as heads to a CTA
#define SEAL_BACKWARD_DIVISORS 1
#endif
#ifndef SEAL_BACKWARD_PDL  // programmatic dependent launch of all kernels but the first
#define SEAL_BACKWARD_PDL 1
#endif
#ifndef SEAL_BACKWARD_HEADS_FIRST  // memory-bound kernels: neighbouring CTAs take neighbouring heads of the same rows
#define SEAL_BACKWARD_HEADS_FIRST 1
#endif
#ifndef SEAL_BACKWARD_LATE_EXACT  // the heads with exact dscale are found beside the walk, not before it
#define SEAL_BACKWARD_LATE_EXACT 0
#endif
#ifndef SEAL_BACKWARD_QUAD_VECTORS  // lse2 and delta of two column pairs in one 16-byte read
#define SEAL_BACKWARD_QUAD_VECTORS 1
#endif
#ifndef SEAL_BACKWARD_PERSISTENT  // main kernel: one CTA a multiprocessor, the next tile's copies under this one's epilogue
#define SEAL_BACKWARD_PERSISTENT 1
#endif
#ifndef SEAL_BACKWARD_PLAIN_STORES  // gradients that are not rotated leave by an unrolled loop of their own
#define SEAL_BACKWARD_PLAIN_STORES 1
#endif
#ifndef SEAL_BACKWARD_ORDERED  // deterministic mode with the persistent kernel: dQ added up in the order of the keys
#define SEAL_BACKWARD_ORDERED 0
#endif
#ifndef SEAL_BACKWARD_LIGHT  // persistent kernel: steps in which none of a warpgroup's keys is seen make dQ only
#define SEAL_BACKWARD_LIGHT 0
#endif
#ifndef SEAL_BACKWARD_COPY_OUT  // persistent kernel: dK and dV that are not rotated leave by the copy engine, under the next tile
#define SEAL_BACKWARD_COPY_OUT 0
#endif

namespace seal::sm90 {

constexpr bool kFill = SEAL_BACKWARD_FILL, kDivisors = SEAL_BACKWARD_DIVISORS;
constexpr bool kPdl = SEAL_BACKWARD_PDL, kHeadsFirst = SEAL_BACKWARD_HEADS_FIRST;
constexpr bool kLateExact = SEAL_BACKWARD_LATE_EXACT, kQuadVectors = SEAL_BACKWARD_QUAD_VECTORS;
constexpr bool kPersistent = SEAL_BACKWARD_PERSISTENT, kPlainStores = SEAL_BACKWARD_PLAIN_STORES;
constexpr bool kLight = SEAL_BACKWARD_LIGHT, kCopyOut = SEAL_BACKWARD_COPY_OUT;
constexpr bool kOrdered = SEAL_BACKWARD_ORDERED && kPersistent;

}  // namespace seal::sm90
