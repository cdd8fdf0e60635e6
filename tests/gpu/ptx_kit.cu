// Small kernels that exercise the PTX kit (csrc/cuda/sm90) one piece at a time; driven by test_ptx_kit.py through ctypes.
#include "cuda/sm90/wgmma.cuh"

using namespace seal::sm90;

namespace {

// A from shared memory (either major) or from registers.
enum class Source { kK, kMN, kRegisters };

// c[64][N] = A B over K, fp32. a is [64][K], for Source::kMN [K][64]; b is [N][K], for Major::kMN [K][N].
template <class T, int kN, int kK, Source kA, Major kB>
__global__ void __launch_bounds__(128, 1)
    product_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b, const T* a, float* c) {
  constexpr int kRowsA = kA == Source::kMN ? kK : 64, kColumnsA = kA == Source::kMN ? 64 : kK;
  constexpr int kRowsB = kB == Major::kMN ? kK : kN, kColumnsB = kB == Major::kMN ? kN : kK;
  constexpr int kBytesA = tile_bytes(kRowsA, kColumnsA), kBytesB = tile_bytes(kRowsB, kColumnsB);
  extern __shared__ __align__(1024) uint8_t memory[];
  uint8_t* tile_a = memory;
  uint8_t* tile_b = memory + kBytesA;
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    barrier_init(&full, 1);
    fence_barrier_init();
    barrier_expect_bytes(&full, kBytesA + kBytesB);
    const RowCoordinates origin(false, 0, 0, 0, 0);
    tma_load_tile<kRowsA, kColumnsA>(tile_a, &map_a, &full, 0, origin, policy_evict_first());
    tma_load_tile<kRowsB, kColumnsB>(tile_b, &map_b, &full, 0, origin, policy_evict_last());
  }
  __syncthreads();
  barrier_wait(&full, 0);

  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = 2 * (threadIdx.x % 4);
  float acc[kN / 2];
  const Operand<kB, kRowsB> b(tile_b);
  if constexpr (kA == Source::kRegisters) {
    // In the layout of an accumulator, as a product before would have left it.
    float values[kK / 2];
    uint32_t fragment[kK / 4];
    for (int i = 0; i < kK / 2; ++i) values[i] = static_cast<float>(a[(row + 8 * (i / 2 % 2)) * kK + 8 * (i / 4) + column + i % 2]);
    pack_fragment<T>(fragment, values);
    wgmma_fence();
    product<T>(acc, fragment, b, false);
  } else {
    constexpr Major kMajorA = kA == Source::kK ? Major::kK : Major::kMN;
    const Operand<kMajorA, kRowsA> operand_a(tile_a);
    wgmma_fence();
    product<T, kK>(acc, operand_a, b, false);
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) c[(row + 8 * (i / 2 % 2)) * kN + 8 * (i / 4) + column + i % 2] = acc[i];
}

cudaError_t map_of(CUtensorMap* map, const void* data, bool half, int rows, int columns) {
  return make_tile_map(map, {data, 1, rows, 1, columns, 0, columns, 0}, half, false, rows);
}

template <class T, int kN, int kK, Source kA, Major kB>
cudaError_t run_product(const void* a, const void* b, float* c) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  CUtensorMap map_a, map_b;
  cudaError_t status = kA == Source::kMN ? map_of(&map_a, a, kHalf, kK, 64) : map_of(&map_a, a, kHalf, 64, kK);
  if (status == cudaSuccess) status = kB == Major::kMN ? map_of(&map_b, b, kHalf, kK, kN) : map_of(&map_b, b, kHalf, kN, kK);
  constexpr int kBytes = (kA == Source::kMN ? tile_bytes(kK, 64) : tile_bytes(64, kK)) +
                         (kB == Major::kMN ? tile_bytes(kK, kN) : tile_bytes(kN, kK));
  const auto kernel = product_kernel<T, kN, kK, kA, kB>;
  if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  kernel<<<1, 128, kBytes>>>(map_a, map_b, static_cast<const T*>(a), c);
  return cudaGetLastError();
}

// One box of 64 columns x kBox rows through shared memory, from `row` of one sequence to `row` of another.
constexpr int kBox = 32;
__global__ void copy_kernel(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, bool packed, int row,
                            int head, int column, int length, int first, uint16_t* seen) {
  __shared__ __align__(1024) uint8_t tile[tile_bytes(kBox, 64)];
  __shared__ uint64_t full;
  const RowCoordinates at(packed, kBox, row, length, first);
  if (threadIdx.x == 0) {
    barrier_init(&full, 1);
    fence_barrier_init();
    barrier_expect_bytes(&full, sizeof(tile));
    tma_load(tile, &from, &full, column, head, at, policy_evict_first());
  }
  __syncthreads();
  barrier_wait(&full, 0);
  for (int i = threadIdx.x; i < kBox * 64; i += blockDim.x) {  // what arrived, through the swizzle
    seen[i] = *reinterpret_cast<const uint16_t*>(tile + swizzled(i / 64, i % 64 / 8) + i % 8 * 2);
  }
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store(&to, tile, column, head, at);
    bulk_commit();
    bulk_wait();
  }
}

// Transposes a 16x16 matrix of 16-bit elements by stmatrix, and adds it (as float) to `sum` by the bulk reduction.
__global__ void small_kernel(const uint16_t* in, uint16_t* plain, uint16_t* transposed, float* sum) {
  __shared__ __align__(128) uint16_t tile[16][16];
  __shared__ __align__(128) float values[256];
  const int lane = threadIdx.x, row = lane / 4, column = 2 * (lane % 4);
  const auto load = [&](int r, int c) { return *reinterpret_cast<const uint32_t*>(in + r * 16 + c); };
  const uint32_t r0 = load(row, column), r1 = load(row + 8, column), r2 = load(row, column + 8), r3 = load(row + 8, column + 8);
  stmatrix(smem_address(&tile[lane % 16][lane / 16 * 8]), r0, r1, r2, r3);
  __syncwarp();
  for (int i = lane; i < 256; i += 32) plain[i] = tile[i / 16][i % 16];
  __syncwarp();
  stmatrix_transposed(smem_address(&tile[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]), r0, r1, r2, r3);
  __syncwarp();
  for (int i = lane; i < 256; i += 32) {
    transposed[i] = tile[i / 16][i % 16];
    values[i] = in[i];
  }
  fence_proxy_async();
  __syncwarp();
  if (elect_one()) {
    bulk_reduce_add(sum, values, sizeof(values), policy_evict_last());
    bulk_commit();
    bulk_wait();
  }
}

}  // namespace

// The products that were built: (N, K, A source, B major, fp16).
#define PRODUCTS_FOR_N(P, N) P(N, 128, kK, kK, __nv_bfloat16) P(N, 128, kRegisters, kMN, __nv_bfloat16)
#define PRODUCTS(P)                                                                                                   \
  PRODUCTS_FOR_N(P, 64) PRODUCTS_FOR_N(P, 128) PRODUCTS_FOR_N(P, 256)                                                 \
  P(80, 256, kK, kK, __nv_bfloat16) P(256, 80, kRegisters, kMN, __nv_bfloat16)                                        \
  P(64, 128, kRegisters, kK, __nv_bfloat16) P(64, 128, kK, kMN, __nv_bfloat16) P(128, 80, kK, kMN, __nv_bfloat16)     \
  P(256, 64, kK, kMN, __nv_bfloat16) P(64, 64, kMN, kK, __nv_bfloat16) P(128, 128, kMN, kMN, __nv_bfloat16)           \
  P(256, 80, kMN, kMN, __nv_bfloat16)                                                                                 \
  P(128, 128, kK, kK, __half) P(128, 128, kRegisters, kMN, __half) P(64, 64, kMN, kMN, __half)

extern "C" {

// Writes (N, K, A source 0 K 1 MN 2 registers, B major 0 K 1 MN, fp16) of every product; returns their number.
int kit_products(int* list) {
  int count = 0;
#define LIST(N, K, A, B, T)                                                                          \
  {                                                                                                  \
    const int row[5] = {N, K, static_cast<int>(Source::A), static_cast<int>(Major::B), std::is_same_v<T, __half>}; \
    for (int i = 0; i < 5; ++i) list[5 * count + i] = row[i];                                        \
    ++count;                                                                                         \
  }
  PRODUCTS(LIST)
  return count;
}

int kit_product(int index, const void* a, const void* b, float* c) {
  int count = 0;
#define RUN(N, K, A, B, T) \
  if (count++ == index) return run_product<T, N, K, Source::A, Major::B>(a, b, c);
  PRODUCTS(RUN)
  return cudaErrorInvalidValue;
}

// from, to: [batch][rows][heads][head_dim] (packed: batch 1), contiguous.
int kit_copy(const void* from, const void* to, int batch, int rows, int heads, int head_dim, bool packed, int row, int head, int column,
             int length, int first, void* seen) {
  CUtensorMap maps[2];
  for (int i = 0; i < 2; ++i) {
    const TileSource source{i == 0 ? from : to, batch, rows, heads, head_dim, int64_t{rows} * heads * head_dim, int64_t{heads} * head_dim, head_dim};
    const cudaError_t status = make_tile_map(&maps[i], source, false, packed, kBox);
    if (status != cudaSuccess) return status;
  }
  copy_kernel<<<1, 128>>>(maps[0], maps[1], packed, row, head, column, length, first, static_cast<uint16_t*>(seen));
  return cudaGetLastError();
}

int kit_small(const void* in, void* plain, void* transposed, float* sum) {
  small_kernel<<<1, 32>>>(static_cast<const uint16_t*>(in), static_cast<uint16_t*>(plain), static_cast<uint16_t*>(transposed), sum);
  return cudaGetLastError();
}

}  // extern "C"
