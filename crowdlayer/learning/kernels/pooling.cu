// Max pooling.

// A block is 256 eights of one row of pixels. Known when they are compiled, side and stride cost no division.

__device__ __forceinline__ void pool(const Eight* __restrict__ x, int columns, int height, int width, int down,
                                     int across, int side, int stride, int padding, Eight* __restrict__ y,
                                     uint2* __restrict__ place) {
  int t = blockIdx.y * 256 + threadIdx.x;
  if (t >= across * columns) return;
  int column = t % columns, col = t / columns * stride - padding, row = blockIdx.x % down * stride - padding;
  const Eight* image = x + (size_t)(blockIdx.x / down) * height * width * columns + column;
  float most[8];
  unsigned int where[8];
#pragma unroll
  for (int c = 0; c < 8; c++) most[c] = -__int_as_float(0x7f800000), where[c] = 255;
#pragma unroll
  for (int v = 0; v < side; v++) {
#pragma unroll
    for (int u = 0; u < side; u++) {
      if (row + v < 0 || row + v >= height || col + u < 0 || col + u >= width) continue;
      float value[8];
      unpack(image[((size_t)(row + v) * width + col + u) * columns], value);
#pragma unroll
      for (int c = 0; c < 8; c++)
        if (where[c] == 255 || value[c] > most[c] || (value[c] != value[c] && most[c] == most[c]))
          most[c] = value[c], where[c] = v * side + u;
    }
  }
  size_t at = (size_t)blockIdx.x * across * columns + t;
  y[at] = packed(most);
  place[at] = make_uint2(where[0] | where[1] << 8 | where[2] << 16 | where[3] << 24,
                         where[4] | where[5] << 8 | where[6] << 16 | where[7] << 24);
}

__device__ __forceinline__ void unpool(const Eight* __restrict__ dy, const Eight* __restrict__ other,
                                       const uint2* __restrict__ place, int has_other, int columns, int height,
                                       int width, int down, int across, int side, int stride, int padding,
                                       Eight* __restrict__ dx) {
  int t = blockIdx.y * 256 + threadIdx.x;
  if (t >= width * columns) return;
  int column = t % columns, col = t / columns + padding, row = blockIdx.x % height + padding;
  int before = (side + stride - 1) / stride - 1;  // windows that may have the pixel, but for the last one
  size_t image = (size_t)(blockIdx.x / height) * down * across;
  float sum[8] = {0};
#pragma unroll
  for (int b = before; b >= 0; b--) {
#pragma unroll
    for (int a = before; a >= 0; a--) {
      int j = row / stride - b, i = col / stride - a, v = row - j * stride, u = col - i * stride;
      if (j < 0 || j >= down || v >= side || i < 0 || i >= across || u >= side) continue;
      size_t window = (image + (size_t)j * across + i) * columns + column;
      unsigned int own = v * side + u;
      uint2 where = place[window];
      float gradient[8], added[8];
      unpack(dy[window], gradient);
      if (has_other) unpack(other[window], added);
#pragma unroll
      for (int c = 0; c < 8; c++)
        if (((c < 4 ? where.x : where.y) >> c % 4 * 8 & 255) == own)
          sum[c] += has_other ? gradient[c] + added[c] : gradient[c];
    }
  }
  dx[(size_t)blockIdx.x * width * columns + t] = packed(sum);
}

// `place` says which of a window's pixels, row by row, is the largest, the first one of equals, or NaN.
extern "C" __global__ void __launch_bounds__(256)
    largest(const Eight* __restrict__ x, int columns, int height, int width, int down, int across, int side, int stride,
            int padding, Eight* __restrict__ y, uint2* __restrict__ place) {
  if (side == 3 && stride == 2)
    pool(x, columns, height, width, down, across, 3, 2, padding, y, place);
  else
    pool(x, columns, height, width, down, across, side, stride, padding, y, place);
}

// Each pixel gets the gradients, dy (+ other), of the windows where it is the largest.
extern "C" __global__ void __launch_bounds__(256)
    of_largest(const Eight* __restrict__ dy, const Eight* __restrict__ other, const uint2* __restrict__ place,
               int has_other, int columns, int height, int width, int down, int across, int side, int stride,
               int padding, Eight* __restrict__ dx) {
  if (side == 3 && stride == 2)
    unpool(dy, other, place, has_other, columns, height, width, down, across, 3, 2, padding, dx);
  else
    unpool(dy, other, place, has_other, columns, height, width, down, across, side, stride, padding, dx);
}
