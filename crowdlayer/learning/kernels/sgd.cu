// Stochastic gradient descent of weights in float32 by gradients in bfloat16.

#define AT_ONCE 4  // weights of a thread

// velocity = momentum · velocity + gradient + decay · weight, and weight -= rate · velocity; without momentum there is no
// velocity.
extern "C" __global__ void __launch_bounds__(256)
    sgd(float* __restrict__ weight, float* __restrict__ velocity, const unsigned short* __restrict__ gradient,
        const float* __restrict__ rate, int n, double momentum, double decay) {
  float weights[AT_ONCE], velocities[AT_ONCE] = {0}, gradients[AT_ONCE], by = *rate;
  int first = blockIdx.x * 256 * AT_ONCE + threadIdx.x;
#pragma unroll
  for (int k = 0; k < AT_ONCE; k++) {
    int i = first + k * 256;
    if (i >= n) break;
    weights[k] = weight[i];
    gradients[k] = __uint_as_float((unsigned int)gradient[i] << 16);
    if (momentum != 0) velocities[k] = velocity[i];
  }
#pragma unroll
  for (int k = 0; k < AT_ONCE; k++) {
    int i = first + k * 256;
    if (i >= n) break;
    float by_decay = fmaf((float)decay, weights[k], gradients[k]);
    velocities[k] = fmaf((float)momentum, velocities[k], by_decay);
    if (momentum != 0) velocity[i] = velocities[k];
    weight[i] = fmaf(-by, velocities[k], weights[k]);
  }
}
