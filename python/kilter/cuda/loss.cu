// Softmax with cross-entropy: the loss of all samples and its gradient in one launch.

const int KT_WARPS = 8;  // of a block at most

KT_DEVICE float exponential(float x) { return expf(x); }
KT_DEVICE double exponential(double x) { return exp(x); }

// The largest of a block's numbers, in every thread; `scratch` may be used again after the next barrier of the block.
KT_DEVICE kt_real block_most(kt_real x, kt_real* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    const kt_real other = __shfl_xor_sync(KT_WARP, x, offset);
    x = other > x ? other : x;
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  for (int w = 0; w < (int)blockDim.x / 32; ++w) x = scratch[w] > x ? scratch[w] : x;
  return x;
}

// For sample n with z' = z - max z and total = sum exp z':
//   loss += w (log total - sum q z'),  dz = w (exp z' / total - q).
// q is on for the label and off for every other class, or (on - off) targets + off; w is weights[n], or 1 / samples.
// out <- (loss, how many samples have a label outside [0, classes) or targets that are no probabilities).
// A block takes every gridDim.x-th sample; `partial` has two numbers for each block, and the last block adds them up: the
// grid depends on the number of samples alone, and so does the order of all sums. Compilers that are left to choose how many
// blocks share a multiprocessor spill registers on sm_90 and sm_103.
KT_KERNEL(256, 3) softmax_cross_entropy(const KT_T* z, const double* targets, int soft, const double* weights, int samples,
                                        int classes, double on, double off, double* partial, unsigned* ticket, KT_T* dz,
                                        double* out) {
  KT_SHARED(kt_real, tops, KT_WARPS);
  KT_SHARED(double, scratch, 3 * KT_WARPS);
  double losses = 0.0, wrong = 0.0;
  for (int n = blockIdx.x; n < samples; n += gridDim.x) {
    const long long start = (long long)n * classes;
    const KT_T* row = z + start;
    const double* q = targets + (soft ? start : n);
    kt_real top = row[(int)threadIdx.x < classes ? threadIdx.x : 0];
    for (int k = threadIdx.x; k < classes; k += blockDim.x) top = row[k] > top ? row[k] : top;
    top = block_most(top, tops);

    double found[3] = {0.0, 0.0, 0.0}, sums[3];  // of the powers, of what is taken from log total, of the targets
    for (int k = threadIdx.x; k < classes; k += blockDim.x) {
      const kt_real below = row[k] - top;
      found[0] += (double)exponential(below);
      if (soft) {
        found[1] += (q[k] * (on - off) + off) * (double)below;
        found[2] += q[k] >= 0.0 ? q[k] : 2.0;  // a sum that is refused
      } else if (off != 0.0) {  // otherwise an infinite logit of another class does not count
        found[1] += off * (double)below;
      }
    }
    block_sums(found, scratch, sums);

    int label = -1;
    double taken = sums[1];
    if (soft) {
      wrong += fabs(sums[2] - 1.0) < 2e-2 ? 0.0 : 1.0;  // wide enough for rows rounded to bfloat16
    } else if (q[0] >= 0.0 && q[0] < (double)classes) {
      label = (int)q[0];
      taken += (on - off) * (double)(row[label] - top);
    } else {
      wrong += 1.0;
    }
    const double weight = weights ? weights[n] : 1.0 / samples;
    losses += (log(sums[0]) - taken) * weight;
    const kt_real inverse = (kt_real)(1.0 / sums[0]), w = (kt_real)weight;
    for (int k = threadIdx.x; k < classes; k += blockDim.x) {
      const kt_real own = (kt_real)(soft ? q[k] * (on - off) + off : k == label ? on : off);
      dz[start + k] = (exponential(row[k] - top) * inverse - own) * w;
    }
  }
  if (threadIdx.x == 0) partial[2 * blockIdx.x] = losses, partial[2 * blockIdx.x + 1] = wrong;
  if (!kt_last_block(ticket, gridDim.x)) return;
  double found[2] = {0.0, 0.0}, sums[2];
  for (int b = threadIdx.x; b < gridDim.x; b += blockDim.x) {
    found[0] += partial[2 * b];
    found[1] += partial[2 * b + 1];
  }
  block_sums(found, scratch, sums);
  if (threadIdx.x == 0) out[0] = sums[0], out[1] = sums[1];
}
