// What the other files begin with. All is in bfloat16, channels last: rows (images · height · width) of `columns` times
// eight channels.

// A kernel that is launched early is on its way while the one before it on its stream ends, from where that says so: only
// behind this may it touch what that one leaves, which for this one is not read only.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

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
