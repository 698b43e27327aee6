#include "channels.cuh"
// Batch norm of a block's channels (Ioffe, Szegedy 2015, arXiv:1502.03167): moments of a part, how parts merge, what is
// written.

const int KT_U = 4, KT_U2 = 2;  // vectors that a thread reads at once: of one array, of each of two or three

KT_DEVICE kt_real centred(kt_real x, kt_real hi, kt_real lo) { return (x - hi) - lo; }

// A store of what is read again soon, or of what is too large for that.
KT_DEVICE void put(KT_T* p, const Vec<kt_real, KT_V>& wide, int large) {
  const Vec<KT_T, KT_V> value = narrow_all<KT_T>(wide);
  if (large) stream<KT_V>(p, value);
  else store<KT_V>(p, value);
}

// Read the vectors of an array, or of two.
struct One {
  const KT_T* x;
  template <typename Look, int U> KT_DEVICE void operator()(const Look& look, Vec<KT_T, KT_V> (&to)[U]) const {
    look.read(x, to);
  }
};
struct Two {
  const KT_T *dy, *x;
  template <typename Look, int U>
  KT_DEVICE void operator()(const Look& look, Vec<KT_T, KT_V> (&to)[U], Vec<KT_T, KT_V> (&to_x)[U]) const {
    look.read(dy, to);
    look.read(x, to_x);
  }
};

// --------------------------------------------------------------------------- statistics

// The sums of weights, of weighted differences from `shift` and of their squares: a few values in kt_real, then kt_sum.
template <bool WEIGHTED> struct Sums {
  kt_sum weight[KT_A], first[KT_A], second[KT_A];

  template <typename Look, int U>
  KT_DEVICE void add(const Look& look, const Vec<KT_T, KT_V> (&x)[U], const kt_real* weights,
                     const kt_real (&shift)[KT_A]) {
    kt_real w1[KT_A] = {}, d1[KT_A] = {}, d2[KT_A] = {};
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!look.has(u)) continue;
      Vec<kt_real, KT_W> w;
      if (WEIGHTED) w = weights_at(weights, look.at[u]);
#pragma unroll
      for (int v = 0; v < KT_V; ++v) {
        const int a = KT_COLUMNS ? v : 0;
        kt_real d = widen(x[u].v[v]) - shift[a];
        if (WEIGHTED) {
          const kt_real one = w.v[KT_COLUMNS ? 0 : v];
          if (one == 0) d = 0;  // whatever lies there
          w1[a] += one;
          d1[a] += one * d;
          d2[a] += one * d * d;
        } else {
          d1[a] += d;
          d2[a] += d * d;
        }
      }
    }
#pragma unroll
    for (int a = 0; a < KT_A; ++a) {
      if (WEIGHTED) weight[a] += w1[a];
      first[a] += d1[a];
      second[a] += d2[a];
    }
  }
};

// Puts about what to sum each column into `shift`: the mean of the first values of the block's part that have a weight,
// in the precision of the data; or 0 where the mean is small beside the spread, since a difference from a small number
// with digits of its own would be rounded always the same way. Returns that of the channel of this thread's team.
template <bool WEIGHTED>
KT_DEVICE kt_real find_shift(const Split& split, const Block& own, const KT_T* x, const kt_real* weights,
                             kt_real (&shift)[KT_A]) {
  const kt_real zero[KT_A] = {};
  Walk walk(split, own);
  for (long long seen = own.start;;) {
    Sums<WEIGHTED> sums = {};
    const Look<KT_U, false> look(walk);
    if (look.has(0)) {
      Vec<KT_T, KT_V> values[KT_U];
      look.read(x, values);
      sums.add(look, values, weights, zero);
    }
    seen += KT_U * own.rows;
    const double count =
        WEIGHTED ? channel_sum(split, own, sums.weight) : own.values(split, min(seen, own.stop) - own.start);
    const double first = channel_sum(split, own, sums.first), second = channel_sum(split, own, sums.second);
    const bool large = 9.0 * first * first > second * count || second - second != 0.0;
    const kt_real near = widen(narrow<KT_T>((kt_real)(first / count)));
    const kt_real found[2] = {large && near - near == 0 ? near : 0, (kt_real)(count > 0.0)};
    const kt_real* all = for_all(own, found);
#pragma unroll
    for (int a = 0; a < KT_A; ++a) shift[a] = all[own.channel(split, a) * 2];
    if (!WEIGHTED || all[1] != 0 || seen >= own.stop) return own.k < own.channels ? all[own.k * 2] : 0;
  }
}

// From the sums of differences from `about` and of their squares.
KT_DEVICE Moments<double> moments_about(double about, double count, double first, double second) {
  const double m2 = second - first * first / count;
  return Moments<double>{count, about + first / count, m2 < 0.0 ? 0.0 : m2};
}

// The moments of the block's part: in each thread those of its team's channel. `read` gives the values of a look.
template <bool WEIGHTED, typename Read>
KT_DEVICE Moments<double> part_moments(const Split& split, const Block& own, const KT_T* x, const kt_real* weights,
                                       const Read& read) {
  const int U = WEIGHTED ? 1 : KT_U;
  kt_real shift[KT_A];
  const double about = find_shift<WEIGHTED>(split, own, x, weights, shift);
  Sums<WEIGHTED> sums = {};
  each_look<U>(Walk(split, own), [&](const auto& look) {
    Vec<KT_T, KT_V> values[U];
    read(look, values);
    sums.add(look, values, weights, shift);
  });
  const double count = WEIGHTED ? channel_sum(split, own, sums.weight) : own.values(split, own.stop - own.start);
  const double first = channel_sum(split, own, sums.first), second = channel_sum(split, own, sums.second);
  return count > 0.0 ? moments_about(about, count, first, second) : Moments<double>{0.0, 0.0, 0.0};
}

// The moments of all parts of the channel of this thread's team, the same bits in each of its lanes: sums about the mean
// of part 0. part(s) gives those of part s; parts without values have a mean of zero.
template <typename Part> KT_DEVICE Moments<double> merge_parts(const Block& own, int parts, const Part& part) {
  const bool has = own.k < own.channels;
  const double about = has ? part(0).mean : 0.0;
  double count = 0.0, first = 0.0, second = 0.0;
#pragma unroll 4
  for (int s = own.j; has && s < parts; s += own.team) {
    const Moments<double> m = part(s);
    const double d = m.mean - about;
    count += m.count;
    first += m.count * d;
    second += m.m2 + m.count * d * d;
  }
  count = team_sum(count, own.team);
  first = team_sum(first, own.team);
  second = team_sum(second, own.team);
  return count > 0.0 ? moments_about(about, count, first, second) : Moments<double>{0.0, 0.0, 0.0};
}

// What the parts of a channel leave for each other: `partial` holds 3 numbers for each part and channel.
KT_DEVICE void put_part(double* partial, int part, int channels, int c, const Moments<double>& m) {
  double* to = partial + ((long long)part * channels + c) * 3;
  to[0] = m.count;
  to[1] = m.mean;
  to[2] = m.m2;
}
KT_DEVICE Moments<double> get_part(const double* partial, int part, int channels, int c) {
  const double* from = partial + ((long long)part * channels + c) * 3;
  return Moments<double>{from[0], from[1], from[2]};
}

// What turns sums into a normalisation; h = (eps, momentum, unbiased).
struct Normal {
  kt_real hi, lo, rstd;  // the mean is hi + lo
  KT_DEVICE Normal(const Moments<double>& m, double eps)
      : hi((kt_real)m.mean), lo((kt_real)(m.mean - hi)), rstd((kt_real)(1.0 / sqrt(m.m2 / m.count + eps))) {}
};

KT_DEVICE kt_real moved(kt_real s, double x, double momentum) { return (kt_real)(s + momentum * (x - s)); }

// Writes the moments of channel c.
KT_DEVICE void put_moments(int c, const Moments<double>& m, double* count, double* mean, double* m2) {
  if (c == 0) count[0] = m.count;
  mean[c] = m.mean;
  m2[c] = m.m2;
}

// Writes what follows from the moments of channel c, and moves the running statistics.
KT_DEVICE void put_statistics(int c, const Moments<double>& m, const Normal& normal, const Scalars<3>& h, kt_real* hi,
                              kt_real* lo, kt_real* rstd, kt_real* running_mean, kt_real* running_var) {
  hi[c] = normal.hi;
  lo[c] = normal.lo;
  rstd[c] = normal.rstd;
  const double var = h[2] != 0.0 ? m.m2 / (m.count - 1.0) : m.m2 / m.count;
  if (running_mean) running_mean[c] = moved(running_mean[c], m.mean, h[1]);
  if (running_var) running_var[c] = moved(running_var[c], var, h[1]);
}

// --------------------------------------------------------------------------- the normalised array

// Of each of a thread's columns: y = ((x - hi) - lo) * scale + beta.
struct Affine {
  kt_real hi[KT_A], lo[KT_A], rstd[KT_A], scale[KT_A], beta[KT_A];

  // From vectors with one number for each channel.
  KT_DEVICE Affine(const Split& split, const Block& own, const kt_real* his, const kt_real* los, const kt_real* rstds,
                   const kt_real* gamma, const kt_real* shift)
      : Affine(split, own, his + own.first, los + own.first, rstds + own.first, 1, gamma, shift) {}

  // The block's channel i has hi, lo and rstd at i * stride.
  KT_DEVICE Affine(const Split& split, const Block& own, const kt_real* his, const kt_real* los, const kt_real* rstds,
                   int stride, const kt_real* gamma, const kt_real* shift) {
#pragma unroll
    for (int a = 0; a < KT_A; ++a) {
      const int i = own.channel(split, a), c = own.first + i;
      hi[a] = his[i * stride];
      lo[a] = los[i * stride];
      rstd[a] = rstds[i * stride];
      scale[a] = gamma ? gamma[c] * rstd[a] : rstd[a];
      beta[a] = shift ? shift[c] : 0;
    }
  }
};

// Writes y = ((x - hi) - lo) * (gamma * rstd) + beta + residual, or `floor` where that is less.
template <typename Read>
KT_DEVICE void write_normalised(const Split& split, const Block& own, const Affine& affine, const Read& read,
                                const KT_T* residual, kt_real floor, int large, KT_T* y) {
  each_look<KT_U>(Walk(split, own), [&](const auto& look) {
    Vec<KT_T, KT_V> x[KT_U], r[KT_U];
    read(look, x);
    if (residual) look.read(residual, r);
#pragma unroll
    for (int u = 0; u < KT_U; ++u) {
      if (!look.has(u)) continue;
      Vec<kt_real, KT_V> z;
#pragma unroll
      for (int v = 0; v < KT_V; ++v) {
        const int a = KT_COLUMNS ? v : 0;
        z.v[v] = centred(widen(x[u].v[v]), affine.hi[a], affine.lo[a]) * affine.scale[a] + affine.beta[a];
        if (residual) z.v[v] += widen(r[u].v[v]);
        z.v[v] = z.v[v] < floor ? floor : z.v[v];  // NaN stays
      }
      put(y + look.offset[u], z, large);
    }
  });
}

// --------------------------------------------------------------------------- backward

// dy where z is above `limit`, which is 0 behind a ReLU and NaN without one.
KT_DEVICE kt_real masked(kt_real dy, kt_real z, kt_real limit) { return z <= limit ? 0 : dy; }

// The sums of dz and of dz * x̂ over the block's part: in each thread those of its team's channel.
template <int U = KT_U2, typename Read>
KT_DEVICE void part_sums(const Split& split, const Block& own, const Affine& affine, const Read& read,
                         const KT_T* residual, kt_real limit, double (&sums)[2]) {
  kt_sum sum_dy[KT_A] = {}, sum_dy_xhat[KT_A] = {};
  each_look<U>(Walk(split, own), [&](const auto& look) {
    Vec<KT_T, KT_V> dy[U], x[U], r[U];
    read(look, dy, x);
    if (residual) look.read(residual, r);
    kt_real s1[KT_A] = {}, s2[KT_A] = {};
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!look.has(u)) continue;
#pragma unroll
      for (int v = 0; v < KT_V; ++v) {
        const int a = KT_COLUMNS ? v : 0;
        const kt_real d = centred(widen(x[u].v[v]), affine.hi[a], affine.lo[a]);
        kt_real z = d * affine.scale[a] + affine.beta[a];
        if (residual) z += widen(r[u].v[v]);
        const kt_real dz = masked(widen(dy[u].v[v]), z, limit);
        s1[a] += dz;
        s2[a] += dz * (d * affine.rstd[a]);
      }
    }
#pragma unroll
    for (int a = 0; a < KT_A; ++a) {
      sum_dy[a] += s1[a];
      sum_dy_xhat[a] += s2[a];
    }
  });
  sums[0] = channel_sum(split, own, sum_dy);
  sums[1] = channel_sum(split, own, sum_dy_xhat);
}

// What the parts of a channel leave for each other: `partial` holds 2 numbers for each part and channel.
KT_DEVICE void put_sums(double* partial, int part, int channels, int c, const double (&sums)[2]) {
  double* to = partial + ((long long)part * channels + c) * 2;
  to[0] = sums[0];
  to[1] = sums[1];
}

// The sums of all parts of the channel of this thread's team, the same bits in each of its lanes.
KT_DEVICE void merge_sums(const Block& own, int parts, const double* partial, int channels, int c, double (&sums)[2]) {
  sums[0] = sums[1] = 0.0;
#pragma unroll 4
  for (int s = own.j; own.k < own.channels && s < parts; s += own.team) {
    const double* from = partial + ((long long)s * channels + c) * 2;
    sums[0] += from[0];
    sums[1] += from[1];
  }
  sums[0] = team_sum(sums[0], own.team);
  sums[1] = team_sum(sums[1], own.team);
}

// Of one channel, from its sums: the mean of dz, and rstd times the mean of dz * x̂.
KT_DEVICE kt_real mean_of(double sum, double inverse) { return (kt_real)(sum * inverse); }
KT_DEVICE kt_real slope_of(double sum, double inverse, kt_real rstd) { return (kt_real)(sum * inverse * (double)rstd); }

// Writes dx = gamma * rstd * (dz - w * mean_dy - (x - mean) * w * slope), and dz.
template <bool WEIGHTED, int U = KT_U2, typename Read>
KT_DEVICE void write_gradient(const Split& split, const Block& own, const Affine& affine, const kt_real (&mean_dy)[KT_A],
                              const kt_real (&slope)[KT_A], const Read& read, const kt_real* weights,
                              const KT_T* residual, kt_real limit, int large, KT_T* dx, KT_T* dresidual) {
  each_look<U>(Walk(split, own), [&](const auto& look) {
    Vec<KT_T, KT_V> dy[U], x[U], r[U];
    read(look, dy, x);
    if (residual) look.read(residual, r);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!look.has(u)) continue;
      Vec<kt_real, KT_W> w;
      if (WEIGHTED) w = weights_at(weights, look.at[u]);
      Vec<kt_real, KT_V> dz, g;
#pragma unroll
      for (int v = 0; v < KT_V; ++v) {
        const int a = KT_COLUMNS ? v : 0;
        const kt_real d = centred(widen(x[u].v[v]), affine.hi[a], affine.lo[a]);
        kt_real z = d * affine.scale[a] + affine.beta[a];
        if (residual) z += widen(r[u].v[v]);
        dz.v[v] = masked(widen(dy[u].v[v]), z, limit);
        const kt_real one = WEIGHTED ? w.v[KT_COLUMNS ? 0 : v] : kt_real(1);
        g.v[v] = ((dz.v[v] - mean_dy[a] * one) - d * (slope[a] * one)) * affine.scale[a];
      }
      put(dx + look.offset[u], g, large);
      if (dresidual) put(dresidual + look.offset[u], dz, large);
    }
  });
}

// The same for all threads of a block, each of whose teams brings what belongs to its channel.
template <int U = KT_U2, typename Read>
KT_DEVICE void write_with(const Split& split, const Block& own, const Affine& affine, kt_real mean_dy, kt_real slope,
                          const Read& read, const kt_real* weights, const KT_T* residual, kt_real limit, int large,
                          KT_T* dx, KT_T* dresidual) {
  const kt_real found[2] = {mean_dy, slope};
  const kt_real* all = for_all(own, found);
  kt_real means[KT_A], slopes[KT_A];
#pragma unroll
  for (int a = 0; a < KT_A; ++a) {
    means[a] = all[own.channel(split, a) * 2];
    slopes[a] = all[own.channel(split, a) * 2 + 1];
  }
  if (weights)
    write_gradient<true, U>(split, own, affine, means, slopes, read, weights, residual, limit, large, dx, dresidual);
  else
    write_gradient<false, U>(split, own, affine, means, slopes, read, weights, residual, limit, large, dx, dresidual);
}
