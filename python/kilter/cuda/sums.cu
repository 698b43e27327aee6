// What ends a reduction: kernels that put together what blocks have left in a workspace, in float64 and a fixed order.

// Sums the rows of `partial`, each of 2 * width numbers: those of the gradients of beta, then of gamma.
KT_KERNEL(256) sum_rows(const kt_real* partial, long long rows, long long width, double* sum_dy, double* sum_dy_xhat) {
  KT_SHARED(double, scratch, 256);
  const long long column = (long long)blockIdx.x * 32 + threadIdx.x, all = 2 * width;
  double sum = 0.0;
  if (column < all) {
#pragma unroll 4
    for (long long r = threadIdx.y; r < rows; r += 8) sum += partial[r * all + column];
  }
  scratch[threadIdx.y * 32 + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || column >= all) return;
#pragma unroll
  for (int y = 1; y < 8; ++y) sum += scratch[y * 32 + threadIdx.x];
  if (column < width) sum_dy[column] = sum;
  else sum_dy_xhat[column - width] = sum;
}

// The moments of each row, a block's, from the `parts` of it, (count, mean, m2) each; and what is asked for of hi, lo,
// rstd, mean and m2.
KT_KERNEL(128) merge_moments(const double* partial, int parts, kt_real* hi, kt_real* lo, kt_real* rstd, double* mean,
                             double* m2, Scalars<1> h) {
  KT_SHARED(Moments<double>, scratch, 32);
  const long long row = blockIdx.x;
  const int per = (parts + blockDim.x - 1) / blockDim.x, stop = min(parts, (int)(threadIdx.x + 1) * per);
  Moments<double> found = {0.0, 0.0, 0.0};
  for (int i = threadIdx.x * per; i < stop; ++i) {
    const double* const one = partial + (row * parts + i) * 3;
    found = merge(found, Moments<double>{one[0], one[1], one[2]});
  }
  found = block_merge(found, scratch);
  if (threadIdx.x) return;
  if (hi) {
    hi[row] = (kt_real)found.mean;
    lo[row] = (kt_real)(found.mean - (double)(kt_real)found.mean);
  }
  if (rstd) rstd[row] = (kt_real)(1.0 / sqrt(found.m2 / found.count + h[0]));
  if (mean) {
    mean[row] = found.mean;
    m2[row] = found.m2;
  }
}

// From the sums of dy and dy * (x - mean) over parts of the places of each channel, `partial` of shape (samples, parts, 2,
// channels): those over all places, `totals` of shape (samples, 2, channels), the latter times rstd; and of each group,
// a block's, the mean of g = dy * gamma, 0 if not centred, the slope, rstd² times the mean of g * (x - mean), and rstd.
// That is given for each group, or its moments are, of `count` values.
KT_KERNEL(128) merge_sums(const double* partial, int parts, int channels, int groups, const kt_real* gamma,
                          const kt_real* rstd, const double* m2, double count, int is_centred, kt_real* totals,
                          kt_real* means, Scalars<1> h) {
  KT_SHARED(double, scratch, 64);
  const long long sample = blockIdx.x / groups;
  const int group = blockIdx.x - (int)(sample * groups), width = channels / groups;
  const double scale = rstd ? (double)rstd[blockIdx.x] : 1.0 / sqrt(m2[blockIdx.x] / count + h[0]);
  double of_group[2] = {0.0, 0.0}, sums[2];
  for (int c = group * width + threadIdx.x; c < (group + 1) * width; c += blockDim.x) {
    const double* one = partial + sample * parts * 2 * channels + c;
    double dy = 0.0, dy_xhat = 0.0;
#pragma unroll 4
    for (int i = 0; i < parts; ++i, one += 2 * channels) {
      dy += one[0];
      dy_xhat += one[channels];
    }
    dy_xhat *= scale;
    if (totals) {
      kt_real* const to = totals + sample * 2 * channels + c;
      to[0] = (kt_real)dy;
      to[channels] = (kt_real)dy_xhat;
    }
    const double weight = gamma ? (double)gamma[c] : 1.0;
    of_group[0] += weight * dy;
    of_group[1] += weight * dy_xhat;
  }
  block_sums(of_group, scratch, sums);
  if (threadIdx.x) return;
  kt_real* const to = means + 3ll * blockIdx.x;
  to[0] = is_centred ? (kt_real)(sums[0] / count) : kt_real(0);
  to[1] = (kt_real)(sums[1] / count * scale);
  to[2] = (kt_real)scale;
}
