// Patches of images.

// The channels of a patch are its window × window pixels, row by row, with `spread` channels each; what is none of the
// image's, or outside of it, is 0. Patches begin at multiples of `stride` less `offset`.

__device__ __forceinline__ float scaled(const unsigned char* from, int c, const float* factor, const float* summand) {
  return fmaf(*from, factor[c], summand[c]);
}
__device__ __forceinline__ float scaled(const float* from, int, const float*, const float*) { return *from; }

template <class Number>
__device__ __forceinline__ void patch(const Number* __restrict__ images, const float* __restrict__ factor,
                                      const float* __restrict__ summand, int eights, int parts, int height, int width,
                                      int down, int across, int window, int spread, int stride, int offset,
                                      Eight* __restrict__ to) {
  int at = blockIdx.x * 256 + threadIdx.x;
  if (at >= eights) return;
  int part = at % parts, place = at / parts, col = place % across * stride - offset;
  int row = place / across % down * stride - offset;
  const Number* image = images + (size_t)(place / across / down) * height * width * 3;
  float value[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int k = part * 8 + i, c = k % spread, u = col + k / spread % window, v = row + k / spread / window;
    bool there = c < 3 && k < window * window * spread && u >= 0 && u < width && v >= 0 && v < height;
    value[i] = there ? scaled(image + ((size_t)v * width + u) * 3 + c, c, factor, summand) : 0;
  }
  to[at] = packed(value);
}

template <class Number>
__device__ __forceinline__ void any_patch(const Number* __restrict__ images, const float* __restrict__ factor,
                                          const float* __restrict__ summand, int eights, int parts, int height,
                                          int width, int down, int across, int window, int spread, int stride,
                                          int offset, Eight* __restrict__ to) {
  if (window == 2 && spread == 4)  // known when they are compiled, these cost no division
    patch(images, factor, summand, eights, 2, height, width, down, across, 2, 4, stride, offset, to);
  else if (window == 3)
    patch(images, factor, summand, eights, 4, height, width, down, across, 3, 3, stride, offset, to);
  else
    patch(images, factor, summand, eights, parts, height, width, down, across, window, spread, stride, offset, to);
}

extern "C" __global__ void __launch_bounds__(256)
    patches_of_bytes(const unsigned char* __restrict__ images, const float* __restrict__ factor,
                     const float* __restrict__ summand, int eights, int parts, int height, int width, int down,
                     int across, int window, int spread, int stride, int offset, Eight* __restrict__ to) {
  any_patch(images, factor, summand, eights, parts, height, width, down, across, window, spread, stride, offset, to);
}

extern "C" __global__ void __launch_bounds__(256)
    patches_of_floats(const float* __restrict__ images, const float* __restrict__ factor,
                      const float* __restrict__ summand, int eights, int parts, int height, int width, int down,
                      int across, int window, int spread, int stride, int offset, Eight* __restrict__ to) {
  any_patch(images, factor, summand, eights, parts, height, width, down, across, window, spread, stride, offset, to);
}

// Of numbers of 16 bits those at these places, 0 for a place below 0.
extern "C" __global__ void __launch_bounds__(256)
    taken(const unsigned short* __restrict__ from, const int* __restrict__ places, int n,
          unsigned short* __restrict__ to) {
  int i = blockIdx.x * 256 + threadIdx.x;
  if (i < n) to[i] = places[i] < 0 ? 0 : from[places[i]];
}
