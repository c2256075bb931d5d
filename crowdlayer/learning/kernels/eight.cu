// What the other files begin with. All is in bfloat16, channels last: rows (images · height · width) of `columns` times
// eight channels.

struct __align__(16) Eight {
  unsigned int pair[4];
};

__device__ __forceinline__ void unpack(const Eight& from, float* to) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    to[2 * i] = __uint_as_float(from.pair[i] << 16);
    to[2 * i + 1] = __uint_as_float(from.pair[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ Eight packed(const float* from) {
  Eight to;
#pragma unroll
  for (int i = 0; i < 4; i++)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(to.pair[i]) : "f"(from[2 * i + 1]), "f"(from[2 * i]));
  return to;
}
