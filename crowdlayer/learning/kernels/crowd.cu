// The crowd layer of one matrix per worker, and the cross-entropy of the answers, in float32: logits (tasks, classes),
// confusion (workers, classes, classes), and of each answer its task, its worker, and its label, below 0 for none.

#define MOST 128  // classes
#define TASKS 8   // or answers, of a block, a warp each

__device__ __forceinline__ float largest_of(float mine) {
  for (int across = 16; across; across /= 2) mine = fmaxf(mine, __shfl_xor_sync(~0u, mine, across));
  return mine;
}

__device__ __forceinline__ float sum_of(float mine) {
  for (int across = 16; across; across /= 2) mine += __shfl_xor_sync(~0u, mine, across);
  return mine;
}

// Of 32 answers, from `first` on, a bit for each that is of this task or worker.
__device__ __forceinline__ unsigned int found(const long long* __restrict__ of, const long long* __restrict__ label,
                                              int first, int n, int one) {
  int answer = first + threadIdx.x;
  return __ballot_sync(~0u, answer < n && of[answer] == one && label[answer] >= 0);
}

// `probability` (tasks, classes) of the logits, by the first blocks; by the others, an answer for each warp, `slope`
// (answers, classes) of the loss by the scores, and `loss` (answers,).
extern "C" __global__ void __launch_bounds__(32 * TASKS)
    answered(const float* __restrict__ logits, const float* __restrict__ confusion, const long long* __restrict__ task,
             const long long* __restrict__ worker, const long long* __restrict__ label, int tasks, int classes, int n,
             double by, const float* __restrict__ count, int counted, float* __restrict__ probability,
             float* __restrict__ slope, float* __restrict__ loss) {
  __shared__ float probabilities[TASKS][MOST];
  int lane = threadIdx.x, before = (tasks + TASKS - 1) / TASKS, one = blockIdx.x * TASKS + threadIdx.y;
  int answer = blockIdx.x < before ? -1 : one - before * TASKS;
  if (blockIdx.x < before ? one >= tasks : answer >= n) return;
  if (answer >= 0) {
    one = task[answer];
    if (label[answer] < 0) {
      if (lane == 0) loss[answer] = 0;
      return;
    }
  }
  const float* logit = logits + (size_t)one * classes;
  float *mine = probabilities[threadIdx.y], most = -__int_as_float(0x7f800000), sum = 0, missed = 0;
  for (int c = lane; c < classes; c += 32) most = fmaxf(most, logit[c]);
  most = largest_of(most);
  for (int c = lane; c < classes; c += 32) sum += mine[c] = expf(logit[c] - most);
  sum = sum_of(sum);
  for (int c = lane; c < classes; c += 32) mine[c] /= sum;
  if (answer < 0) {
    for (int c = lane; c < classes; c += 32) probability[(size_t)one * classes + c] = mine[c];
    return;
  }
  __syncwarp();
  const float* matrix = confusion + (size_t)worker[answer] * classes * classes;
  float score[MOST / 32];
  most = -__int_as_float(0x7f800000), sum = 0;
#pragma unroll
  for (int k = 0; k < MOST / 32; k++) {
    int c = lane + 32 * k;
    if (c >= classes) continue;
    score[k] = 0;
    for (int t = 0; t < classes; t++) score[k] = fmaf(mine[t], matrix[t * classes + c], score[k]);
    most = fmaxf(most, score[k]);
  }
  most = largest_of(most);
#pragma unroll
  for (int k = 0; k < MOST / 32; k++)
    if (lane + 32 * k < classes) sum += expf(score[k] - most);
  sum = sum_of(sum);
#pragma unroll
  for (int k = 0; k < MOST / 32; k++) {
    int c = lane + 32 * k;
    if (c >= classes) continue;
    slope[(size_t)answer * classes + c] = expf(score[k] - most) / sum - (c == label[answer]);
    if (c == label[answer]) missed = logf(sum) + most - score[k];
  }
  missed = sum_of(missed);
  if (lane == 0) loss[answer] = missed / (counted ? *count : (float)by);
}

// Gradients: the first blocks find the logits', of the others each one matrix's.
extern "C" __global__ void __launch_bounds__(32 * TASKS)
    of_answered(const float* __restrict__ slope, const float* __restrict__ probability,
                const float* __restrict__ confusion, const long long* __restrict__ task,
                const long long* __restrict__ worker, const long long* __restrict__ label, int tasks, int classes, int n,
                double by, const float* __restrict__ count, int counted, const float* __restrict__ dloss,
                float* __restrict__ dlogits, float* __restrict__ dconfusion) {
  int lane = threadIdx.x, before = (tasks + TASKS - 1) / TASKS, one = blockIdx.x * TASKS + threadIdx.y;
  float scale = *dloss / (counted ? *count : (float)by);
  if (blockIdx.x < before) {
    if (one >= tasks) return;
    const float* mine = probability + (size_t)one * classes;
    float gradient[MOST / 32] = {0}, mean = 0;
    for (int first = 0; first < n; first += 32) {
      for (unsigned int bits = found(task, label, first, n, one); bits; bits &= bits - 1) {
        int answer = first + __ffs(bits) - 1;
        const float *matrix = confusion + (size_t)worker[answer] * classes * classes, *of = slope + (size_t)answer * classes;
#pragma unroll
        for (int k = 0; k < MOST / 32; k++)
          if (lane + 32 * k < classes)
            for (int c = 0; c < classes; c++) gradient[k] = fmaf(matrix[(lane + 32 * k) * classes + c], of[c], gradient[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < MOST / 32; k++)
      if (lane + 32 * k < classes) mean = fmaf(mine[lane + 32 * k], gradient[k], mean);
    mean = sum_of(mean);
#pragma unroll
    for (int k = 0; k < MOST / 32; k++) {
      int t = lane + 32 * k;
      if (t < classes) dlogits[(size_t)one * classes + t] = scale * mine[t] * (gradient[k] - mean);
    }
  } else {
    int cells = classes * classes;
    one = blockIdx.x - before;
    for (int from = 0; from < cells; from += 32 * TASKS) {
      int cell = from + threadIdx.y * 32 + lane;
      float sum = 0;
      for (int first = 0; first < n; first += 32) {
        for (unsigned int bits = found(worker, label, first, n, one); bits; bits &= bits - 1) {
          int answer = first + __ffs(bits) - 1;
          if (cell < cells)
            sum = fmaf(probability[task[answer] * classes + cell / classes],
                       slope[(size_t)answer * classes + cell % classes], sum);
        }
      }
      if (cell < cells) dconfusion[(size_t)one * cells + cell] = scale * sum;
    }
  }
}
