// Enough of CUDA to run our kernels on a CPU: the threads of a block are threads, blocks run one after the other.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __align__(n) alignas(n)
#define __device__ static
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static

using std::fmaf, std::max, std::min;

struct float2 {
  float x, y;
};
struct uint2 {
  unsigned int x, y;
};
struct Place {
  int x, y, z;
};

static thread_local Place threadIdx;
static Place blockIdx, blockDim, gridDim;
static std::unique_ptr<std::barrier<>> block;
static std::vector<std::unique_ptr<std::barrier<>>> warps;
static float exchanged[32][32];

static float2 make_float2(float x, float y) { return {x, y}; }
static uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }
static float rsqrtf(float x) { return 1 / std::sqrt(x); }

static float __uint_as_float(unsigned int bits) {
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}
static float __int_as_float(int bits) { return __uint_as_float(bits); }

// bfloat16, to the nearest, of two equally near ones to the even one
static unsigned int rounded(float number) {
  unsigned int bits;
  std::memcpy(&bits, &number, 4);
  return std::isnan(number) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static unsigned int two_rounded(float high, float low) { return rounded(high) << 16 | rounded(low); }

static void __syncthreads() { block->arrive_and_wait(); }

static float __shfl_xor_sync(unsigned int, float mine, int across) {
  int t = threadIdx.y * blockDim.x + threadIdx.x, warp = t / 32;
  exchanged[warp][t % 32] = mine;
  warps[warp]->arrive_and_wait();
  float others = exchanged[warp][(t % 32) ^ across];
  warps[warp]->arrive_and_wait();
  return others;
}

static void __syncwarp() { warps[(threadIdx.y * blockDim.x + threadIdx.x) / 32]->arrive_and_wait(); }

static unsigned int __ballot_sync(unsigned int, bool mine) {
  int t = threadIdx.y * blockDim.x + threadIdx.x, warp = t / 32;
  exchanged[warp][t % 32] = mine;
  warps[warp]->arrive_and_wait();
  unsigned int bits = 0;
  for (int lane = 0; lane < 32; lane++) bits |= (exchanged[warp][lane] != 0) << lane;
  warps[warp]->arrive_and_wait();
  return bits;
}

static int __ffs(unsigned int bits) { return __builtin_ffs(bits); }

template <class Kernel>
static void launch(const int* blocks, const int* threads, Kernel kernel) {
  gridDim = {blocks[0], blocks[1], blocks[2]};
  blockDim = {threads[0], threads[1], threads[2]};
  int n = threads[0] * threads[1];
  for (int y = 0; y < blocks[1]; y++) {
    for (int x = 0; x < blocks[0]; x++) {
      blockIdx = {x, y, 0};
      block = std::make_unique<std::barrier<>>(n);
      warps.clear();
      for (int warp = 0; warp < n / 32; warp++) warps.push_back(std::make_unique<std::barrier<>>(32));
      std::vector<std::thread> running;
      for (int t = 0; t < n; t++) {
        running.emplace_back([=] {
          threadIdx = {t % threads[0], t / threads[0], 0};
          kernel();
        });
      }
      for (auto& thread : running) thread.join();
    }
  }
}
