// What changes from step to step and must not wait for the host: whether a step is skipped, the scale of its gradients, the
// clocks of the parameters, and the scalars that rules are given. One block.

// How a rule's scalars depend on its clock; the host numbers them likewise.
enum Kind { STEADY, DAMPENED, DECAYING, WINDOWED, WINDOWED_DELTA, ADAM, ADAMAX, NADAM, NEWTON };

// A rule on a group of parameters. `options` are its scalars at the first step of an uncorrected clock, then what the clock
// needs; `clock` counts applied steps and holds products of betas; `h` is what the step is given.
struct Pass {
  const double* options;
  double* clock;
  double* h;
  int kind, scalars;
  int of_gradients;  // which are scaled and clipped
  int unused;
};

// Products are rounded on their own, as on the host.
KT_DEVICE double times(double a, double b) { return __dmul_rn(a, b); }

// NAdam's mu at step t; o has its beta1 at 2 and its decay at 9.
KT_DEVICE double mu(const double* o, double t) { return times(o[2], 1.0 - times(0.5, pow(0.96, times(t, o[9])))); }

// The weights of each older square and of the present one in rho mean + (1 - rho) g^2, and the row that is replaced.
KT_DEVICE void window(double rho, double rows, double t, double* h) {
  const double share = rho / (t < rows ? t : rows), kept = rows > 1.0 ? rows - 1.0 : 1.0;
  h[3] = rows > 1.0 ? share : 0.0;
  h[4] = share + 1.0 - rho;
  h[-1] = (double)((long long)(t - 1.0) % (long long)kept);
}

// Moves the clock by one step and corrects the scalars, which begin at h.
KT_DEVICE void correct(int kind, const double* o, double* clock, double* h) {
  const double t = clock[0] + 1.0;
  clock[0] = t;
  switch (kind) {
    case DAMPENED:
      if (t > 1.0) h[2] = times(o[2], 1.0 - o[5]);
      break;
    case DECAYING:
      h[0] = o[0] / (1.0 + times(t - 1.0, o[7]));
      break;
    case WINDOWED:
      window(o[6], o[7], t, h);
      break;
    case WINDOWED_DELTA: {
      window(o[7], o[8], t, h);
      const double count = t - 2.0 < o[8] - 1.0 ? t - 2.0 : o[8] - 1.0;  // of updates older than the last
      h[5] = count > 0.0 ? o[7] / count : 0.0;
      h[6] = count > 0.0 ? 1.0 - o[7] : 1.0;
      break;
    }
    case ADAM:
      clock[1] = times(clock[1], o[2]);
      clock[2] = times(clock[2], o[3]);
      h[5] = 1.0 - clock[2];
      h[6] = o[6] / (1.0 - clock[1]);
      break;
    case ADAMAX:
      clock[1] = times(clock[1], o[1]);
      clock[2] = times(clock[2], o[2]);
      h[4] = o[4] / (1.0 - clock[1]);
      break;
    case NADAM: {
      const double now = mu(o, t), next = mu(o, t + 1.0), lr = o[8];
      clock[1] = times(clock[1], now);
      clock[2] = times(clock[2], o[3]);
      h[5] = 1.0 - clock[2];
      h[6] = times(lr, next) / (1.0 - times(clock[1], next));
      h[7] = times(lr, 1.0 - now) / (1.0 - clock[1]);
      break;
    }
    case NEWTON: {
      clock[1] = times(clock[1], o[4]);
      const double seen = 1.0 - clock[1];
      h[2] = seen != 0.0 ? 1.0 / seen : 0.0;
      break;
    }
  }
}

// run = (clip_norm, clip_value, sign, skip, growth, backoff, interval, minimum); `found` has a sum of squares and whether all
// are finite for the gradients, then for `scans - 1` other lists of arrays. `scaler` = (scale, clean steps), or null.
// `applied` counts steps, report = (applied, norm, skipped).
KT_KERNEL(256) tick(const Pass* passes, int count, const double* found, int scans, double* scaler, double* applied,
                    double* report, Scalars<8> run) {
  KT_SHARED(double, shared, 2);
  if (threadIdx.x == 0) {
    double scale = scaler ? 1.0 / scaler[0] : 1.0, norm = scans ? times(sqrt(found[0]), fabs(scale)) : 0.0;
    bool finite = true;
    for (int i = 0; i < scans; ++i) finite = finite && found[2 * i + 1] != 0.0;
    const bool skipped = run[3] != 0.0 && !finite;
    const double factor = run[0] / (norm + 1e-6);
    if (!skipped && factor < 1.0) scale = times(scale, factor);
    if (scaler) {
      scaler[1] = finite ? scaler[1] + 1.0 : 0.0;
      if (!finite) {
        const double less = times(scaler[0], run[5]);
        scaler[0] = less > run[7] ? less : run[7];
      } else if (scaler[1] == run[6]) {
        const double more = times(scaler[0], run[4]), most = 1.7014118346046923e38;  // 2^127: times 1 it is a float32
        scaler[0] = more < most ? more : most;
        scaler[1] = 0.0;
      }
    }
    if (!skipped) applied[0] += 1.0;
    report[0] = applied[0], report[1] = norm, report[2] = skipped ? 1.0 : 0.0;
    shared[0] = times(scale, run[2]);
    shared[1] = skipped ? 1.0 : 0.0;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const Pass pass = passes[i];
    if (shared[1] != 0.0) {
      pass.h[2] = -1.0;
      continue;
    }
    pass.h[0] = pass.of_gradients ? shared[0] : 1.0;
    pass.h[1] = pass.of_gradients ? run[1] : __longlong_as_double(0x7ff0000000000000ll);
    pass.h[2] = 0.0;
    for (int k = 0; k < pass.scalars; ++k) pass.h[3 + k] = pass.options[k];
    if (pass.clock) correct(pass.kind, pass.options, pass.clock, pass.h + 3);
  }
}
