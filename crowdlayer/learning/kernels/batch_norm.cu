// Batch norm with what follows it. Sums are added up in float32, in an order that the shape alone decides.

// Kernels come in pairs: of the first each block leaves two sums for each of its channels in `partial`
// (blocks, 2, channels), and each block of the second adds up all of these for its own channels before it goes on. That
// takes less time than to find out which block of the first was the last one to be through.

#define THREADS 512
#define WARPS (THREADS / 32)
#define WIDEST 32  // threads of a block across, each for eight channels

// Adds up what the threads of a block have.
__device__ __forceinline__ void leave(float (&mine)[16], float* partial, int columns) {
  __shared__ float parts[WARPS][16][WIDEST];
  int wide = blockDim.x, t = threadIdx.y * wide + threadIdx.x;
#pragma unroll
  for (int i = 0; i < 16; i++) {
    for (int across = wide; across < 32; across *= 2) mine[i] += __shfl_xor_sync(~0u, mine[i], across);
    if (t % 32 < wide) parts[t / 32][i][t % 32] = mine[i];
  }
  __syncthreads();
  int i = t / wide, column = blockIdx.x * wide + t % wide;
  if (i >= 16 || column >= columns) return;
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) sum += parts[warp][i][t % wide];
  partial[((size_t)blockIdx.y * 2 + i / 8) * columns * 8 + column * 8 + i % 8] = sum;
}

// Both sums of channel blockIdx.x · 8 · wide + t, for the first 8 · wide threads; all must call it.
__device__ __forceinline__ float2 collected(const float* partial, int blocks, int columns) {
  __shared__ float2 parts[THREADS];
  int here = blockDim.x * 8, t = threadIdx.y * blockDim.x + threadIdx.x, lanes = THREADS / here, channels = columns * 8;
  int channel = blockIdx.x * here + t % here;
  float2 sum = make_float2(0, 0);
  if (channel < channels) {
#pragma unroll 8
    for (int block = t / here; block < blocks; block += lanes) {
      sum.x += partial[(size_t)block * 2 * channels + channel];
      sum.y += partial[((size_t)block * 2 + 1) * channels + channel];
    }
  }
  parts[t] = sum;
  __syncthreads();
  if (t < here)
    for (int lane = 1; lane < lanes; lane++) {
      sum.x += parts[lane * here + t].x;
      sum.y += parts[lane * here + t].y;
    }
  return sum;
}

// Of each channel the sum of the distances to its first value, lest a large mean drown the variance, and of their squares.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    distances(const Eight* __restrict__ x, int rows, int columns, float* __restrict__ partial) {
  int column = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.y;
  float sums[16] = {0};
  if (column < columns) {
    float first[8];
    unpack(x[column], first);
    for (int row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += 8 * step) {
      Eight ahead[8];
#pragma unroll
      for (int k = 0; k < 8; k++)
        if (row + k * step < rows) ahead[k] = x[(size_t)(row + k * step) * columns + column];
#pragma unroll
      for (int k = 0; k < 8; k++) {
        if (row + k * step >= rows) break;
        float value[8];
        unpack(ahead[k], value);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          float distance = value[i] - first[i];
          sums[i] += distance;
          sums[8 + i] = fmaf(distance, distance, sums[8 + i]);
        }
      }
    }
  }
  let_next_begin();
  leave(sums, partial, columns);
}

// y = batch norm of x (+ residual), negative values 0 where there is a ReLU; `positive` has a bit for each that is not.
// The first block leaves mean and 1 / standard deviation, and moves the running statistics.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    normalise(const Eight* __restrict__ x, const Eight* __restrict__ residual, int rows, int columns,
              const float* partial, int blocks, const float* __restrict__ weight,
              const float* __restrict__ bias, double momentum, double eps, int has_residual, int has_relu,
              float* __restrict__ mean, float* __restrict__ invstd, float* __restrict__ running_mean,
              float* __restrict__ running_var, Eight* __restrict__ y, unsigned char* __restrict__ positive) {
  __shared__ float scales[8 * WIDEST], offsets[8 * WIDEST];
  int column = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.y;
  int t = threadIdx.y * blockDim.x + threadIdx.x, channel = blockIdx.x * blockDim.x * 8 + t;
  int row = column < columns ? blockIdx.y * blockDim.y + threadIdx.y : rows;
  Eight ahead[2], other[2];
  auto read = [&] {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      size_t at = (size_t)(row + k * step) * columns + column;
      if (row + k * step < rows) {
        ahead[k] = x[at];
        if (has_residual) other[k] = residual[at];
      }
    }
  };
  read();  // nothing of this is what the one before leaves
  wait_for_previous();
  float2 sum = collected(partial, blocks, columns);
  if (t < blockDim.x * 8 && channel < columns * 8) {
    float first[8];
    unpack(x[channel / 8], first);
    float distance = sum.x / rows, variance = fmaxf(sum.y / rows - distance * distance, 0.f), middle = distance;
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i == channel % 8) middle += first[i];
    float inverse = rsqrtf(variance + (float)eps), scale = weight[channel] * inverse;
    scales[t] = scale;
    offsets[t] = fmaf(-middle, scale, bias[channel]);
    if (blockIdx.y == 0) {
      mean[channel] = middle;
      invstd[channel] = inverse;
      running_mean[channel] += (float)momentum * (middle - running_mean[channel]);
      running_var[channel] += (float)momentum * (variance * ((float)rows / (rows - 1)) - running_var[channel]);
    }
  }
  __syncthreads();
  float scale[8], offset[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    scale[i] = scales[threadIdx.x * 8 + i];
    offset[i] = offsets[threadIdx.x * 8 + i];
  }
  for (; row < rows; row += 2 * step, read()) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      if (row + k * step >= rows) break;
      size_t at = (size_t)(row + k * step) * columns + column;
      float value[8], added[8];
      unpack(ahead[k], value);
      if (has_residual) unpack(other[k], added);
      unsigned int bits = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        value[i] = fmaf(value[i], scale[i], offset[i]);
        if (has_residual) value[i] += added[i];
        if (value[i] > 0) bits |= 1u << i;
        if (has_relu && value[i] < 0) value[i] = 0;  // and NaN stays
      }
      y[at] = packed(value);
      if (has_relu) positive[at] = bits;
    }
  }
}

// Of the gradient, of dy (+ other) as the ReLU lets it through, the sum, and the sum of its products with x - mean.
// Where it is wanted, it is left in `through`.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    products(const Eight* __restrict__ dy, const Eight* __restrict__ other, const Eight* __restrict__ x,
             const unsigned char* __restrict__ positive, int rows, int columns, const float* __restrict__ mean,
             int has_other, int has_relu, int wanted, float* __restrict__ partial, Eight* __restrict__ through) {
  int column = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.y;
  float sums[16] = {0};
  if (column < columns) {
    float middle[8];
#pragma unroll
    for (int i = 0; i < 8; i++) middle[i] = mean[column * 8 + i];
    for (int row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += 4 * step) {
      Eight gradients[4], others[4], values[4];
      unsigned int bits[4] = {255, 255, 255, 255};
#pragma unroll
      for (int k = 0; k < 4; k++) {
        size_t at = (size_t)(row + k * step) * columns + column;
        if (row + k * step < rows) {
          gradients[k] = dy[at];
          values[k] = x[at];
          if (has_other) others[k] = other[at];
          if (has_relu) bits[k] = positive[at];
        }
      }
#pragma unroll
      for (int k = 0; k < 4; k++) {
        if (row + k * step >= rows) break;
        float gradient[8], added[8], value[8];
        unpack(gradients[k], gradient);
        unpack(values[k], value);
        if (has_other) unpack(others[k], added);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          if (has_other) gradient[i] += added[i];
          if (!(bits[k] >> i & 1)) gradient[i] = 0;
          sums[i] += gradient[i];
          sums[8 + i] = fmaf(gradient[i], value[i] - middle[i], sums[8 + i]);
        }
        if (wanted) through[(size_t)(row + k * step) * columns + column] = packed(gradient);
      }
    }
  }
  let_next_begin();
  leave(sums, partial, columns);
}

// dx. The first block leaves the gradients of weight and bias.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    gradient(const Eight* dy, const Eight* __restrict__ x, const unsigned char* __restrict__ positive,
             int rows, int columns, const float* partial, int blocks, const float* __restrict__ mean,
             const float* __restrict__ invstd, const float* __restrict__ weight, int has_relu,
             float* __restrict__ dweight, float* __restrict__ dbias, Eight* __restrict__ dx) {
  __shared__ float scales[8 * WIDEST], slopes[8 * WIDEST], offsets[8 * WIDEST];  // dx = scale · dy + slope · x + offset
  int column = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.y;
  int t = threadIdx.y * blockDim.x + threadIdx.x, channel = blockIdx.x * blockDim.x * 8 + t;
  int row = column < columns ? blockIdx.y * blockDim.y + threadIdx.y : rows;
  Eight gradients[2], values[2];
  unsigned int bits[2] = {255, 255};
  auto read = [&] {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      size_t at = (size_t)(row + k * step) * columns + column;
      if (row + k * step < rows) {
        gradients[k] = dy[at];
        values[k] = x[at];
        if (has_relu) bits[k] = positive[at];
      }
    }
  };
  wait_for_previous();  // which may have left dy
  read();
  float2 sum = collected(partial, blocks, columns);
  if (t < blockDim.x * 8 && channel < columns * 8) {
    float inverse = invstd[channel], scale = weight[channel] * inverse, product = sum.y * inverse;
    float slope = -scale * inverse * product / rows;
    scales[t] = scale;
    slopes[t] = slope;
    offsets[t] = -fmaf(slope, mean[channel], scale * sum.x / rows);
    if (blockIdx.y == 0) {
      dbias[channel] = sum.x;
      dweight[channel] = product;
    }
  }
  __syncthreads();
  float scale[8], slope[8], offset[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    scale[i] = scales[threadIdx.x * 8 + i];
    slope[i] = slopes[threadIdx.x * 8 + i];
    offset[i] = offsets[threadIdx.x * 8 + i];
  }
  for (; row < rows; row += 2 * step, read()) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
      if (row + k * step >= rows) break;
      float through[8], value[8];
      unpack(gradients[k], through);
      unpack(values[k], value);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float passed = bits[k] >> i & 1 ? scale[i] * through[i] : 0;
        value[i] = passed + fmaf(slope[i], value[i], offset[i]);
      }
      dx[(size_t)(row + k * step) * columns + column] = packed(value);
    }
  }
}
