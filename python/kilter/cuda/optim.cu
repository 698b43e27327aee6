#include "tensors.cuh"
// Steps of optimizers: one launch for all tensors. Built without contraction: the bits are those of the CPU.
//
// Macros: KT_T, KT_G, KT_S: types of parameters, gradients and state; KT_MASTERS: whether there are exact copies of the
// parameters; KT_RULE: one of the rules below; KT_H: how many scalars it is given.
//
// A rule makes its constants of the scalars h, in float64, each rounded once. `step` returns the new parameter and changes
// the numbers of state s; the first `windows` of them are the oldest rows of windows, whose sums are `past`.

const int GROUPS = 64;  // most groups of tensors that have scalars of their own
const int CHANGED = 3;  // most numbers of state that a rule changes


// A group's scalars; those of the rule begin at 0.
struct Given {
  const Scalars<KT_H>& h;
  int group;
  KT_DEVICE double at(int i) const { return h.device ? h.device[group * KT_H + i] : h.host[i]; }
  KT_DEVICE double operator[](int i) const { return at(3 + i); }
};

KT_DEVICE float magnitude(float x) { return fabsf(x); }
KT_DEVICE double magnitude(double x) { return fabs(x); }

// x within `limit` of zero; NaN stays NaN.
KT_DEVICE kt_real clamp(kt_real x, kt_real limit) {
  x = x > limit ? limit : x;
  return x < -limit ? -limit : x;
}

// Zero for what would decay into the subnormal range.
KT_DEVICE kt_real flush(kt_real x) {
  const kt_real tiny = sizeof(kt_real) == 4 ? kt_real(1e-30f) : kt_real(1e-290);
  return magnitude(x) < tiny ? kt_real(0) : x;
}

struct Plain {
  static const int windows = 0, slots = 0;
  static const bool ahead = false;  // whether the step needs the gradient once more, in registers, after the state
};

// --------------------------------------------------------------------------- short rules

// Gradient descent: p <- p - lr (g + l2 p).
struct Sgd : Plain {
  kt_real lr, l2;
  KT_DEVICE void make(const Given& h) { lr = h[0], l2 = h[1]; }
  KT_DEVICE kt_real step(kt_real p, kt_real g, const kt_real*, kt_real*) const { return p - lr * (g + l2 * p); }
};

// Momentum (Polyak 1964): v <- momentum v + rate g; p <- p - (size v + look g).
struct Momentum : Plain {
  static const int slots = 1;
  kt_real l2, momentum, rate, size, look;
  KT_DEVICE void make(const Given& h) { l2 = h[0], momentum = h[1], rate = h[2], size = h[3], look = h[4]; }
  KT_DEVICE kt_real step(kt_real p, kt_real g, const kt_real*, kt_real* s) const {
    g = g + l2 * p;
    kt_real v = momentum * s[0] + rate * g;
    s[0] = flush(v);
    return p - (size * v + look * g);
  }
};

// Lion (Chen et al. 2023, arXiv:2302.06675): p <- keep p - lr sign(m + (1 - beta1)(g - m)); m <- m + (1 - beta2)(g - m).
struct Lion : Plain {
  static const int slots = 1;
  kt_real lr, keep, rate1, rate2;
  KT_DEVICE void make(const Given& h) { lr = h[0], keep = h[1], rate1 = 1.0 - h[2], rate2 = 1.0 - h[3]; }
  KT_DEVICE kt_real step(kt_real p, kt_real g, const kt_real*, kt_real* s) const {
    kt_real m = s[0], c = m + rate1 * (g - m);
    // The sign of zero is zero, that of NaN is NaN.
    kt_real step = c > kt_real(0) ? lr : c * kt_real(0);
    step = c < kt_real(0) ? -lr : step;
    s[0] = flush(m + rate2 * (g - m));
    return p * keep - step;
  }
};

// A Newton step along the diagonal: p <- p - clamp(lr g / (inverse h + damping), +- clip).
struct Newton : Plain {
  static const int slots = 1;
  kt_real lr, damping, inverse, clip;
  KT_DEVICE void make(const Given& h) { lr = h[0], damping = h[1], inverse = h[2], clip = h[3]; }
  KT_DEVICE kt_real step(kt_real p, kt_real g, const kt_real*, kt_real* s) const {
    return p - clamp(lr * g / (s[0] * inverse + damping), clip);
  }
};

// The mean absolute curvature, in the place of parameters, from a new one c: h <- h + rate (|c| - h).
struct Curvature : Plain {
  kt_real rate;
  KT_DEVICE void make(const Given& h) { rate = h[0]; }
  KT_DEVICE kt_real step(kt_real h, kt_real c, const kt_real*, kt_real*) const {
    return flush(h + rate * (magnitude(c) - h));
  }
};

// An average a of what comes, in the place of parameters: a <- a + rate (x - a); a rate of 1 takes x itself.
struct Average : Plain {
  kt_real rate;
  KT_DEVICE void make(const Given& h) { rate = h[0]; }
  KT_DEVICE kt_real step(kt_real a, kt_real x, const kt_real*, kt_real*) const {
    return rate == kt_real(1) ? x : a + rate * (x - a);
  }
};

// --------------------------------------------------------------------------- Adam and its kin

// Adam (Kingma, Ba 2015, arXiv:1412.6980) and AdamW (Loshchilov, Hutter 2019, arXiv:1711.05101):
// m <- m + (1 - beta1)(g - m); v <- v + (1 - beta2)(g^2 - v); p <- keep p - size m / (sqrt(v / bias2) + eps).
struct Adam : Plain {
  static const int slots = 2;
  kt_real l2, keep, rate1, rate2, eps, inverse, size, look;
  KT_DEVICE void make(const Given& h) {
    l2 = h[0], keep = h[1], rate1 = 1.0 - h[2], rate2 = 1.0 - h[3], eps = h[4], inverse = 1.0 / sqrt(h[5]);
    size = h[6], look = h[7];
  }
  KT_DEVICE void moments(kt_real p, kt_real& g, kt_real& m, kt_real& v) const {
    g = g + l2 * p;
    m = m + rate1 * (g - m);
    v = v + rate2 * (g * g - v);
  }
  KT_DEVICE kt_real moved(kt_real p, kt_real step, kt_real v) const { return p * keep - step / (root(v) * inverse + eps); }
  KT_DEVICE kt_real step(kt_real p, kt_real g, const kt_real*, kt_real* s) const {
    kt_real m = s[0], v = s[1];
    moments(p, g, m, v);
    s[0] = flush(m), s[1] = flush(v);
    return moved(p, size * m, v);
  }
};

// NAdam (Dozat 2016): Adam that steps along size m + look g.
struct NAdam : Adam {
  static const bool ahead = true;
  KT_DEVICE kt_real step(kt_real p, kt_real g, const kt_real*, kt_real* s) const {
    kt_real m = s[0], v = s[1];
    moments(p, g, m, v);
    s[0] = flush(m), s[1] = flush(v);
    return moved(p, size * m + look * g, v);
  }
};

// AMSGrad (Reddi, Kale, Kumar 2018, arXiv:1904.09237): Adam with the largest second moment so far, before it is corrected.
struct AmsGrad : Adam {
  static const int slots = 3;
  KT_DEVICE kt_real step(kt_real p, kt_real g, const kt_real*, kt_real* s) const {
    kt_real m = s[0], v = s[1], most = s[2];
    moments(p, g, m, v);
    most = most > v ? most : v;
    s[0] = flush(m), s[1] = flush(v), s[2] = flush(most);
    return moved(p, size * m, most);
  }
};

// Adamax (Kingma, Ba 2015, section 7.1): u <- max(beta2 u, |g| + eps); p <- p - size m / u.
struct Adamax : Plain {
  static const int slots = 2;
  kt_real l2, rate1, beta2, eps, size;
  KT_DEVICE void make(const Given& h) { l2 = h[0], rate1 = 1.0 - h[1], beta2 = h[2], eps = h[3], size = h[4]; }
  KT_DEVICE kt_real step(kt_real p, kt_real g, const kt_real*, kt_real* s) const {
    kt_real m = s[0], u = s[1];
    g = g + l2 * p;
    m = m + rate1 * (g - m);
    kt_real old = beta2 * u, now = magnitude(g) + eps;
    u = old > now ? old : now;
    s[0] = flush(m), s[1] = flush(u);
    return p - size * m / u;
  }
};

// --------------------------------------------------------------------------- squares of gradients

// RMSprop (Hinton 2012): v <- v + rate (g^2 - pull v); p <- p - lr g / (sqrt(v) + eps). With a rate of 1 and a pull of 0 it is
// Adagrad (Duchi, Hazan, Singer 2011), which when it lags divides by the sum without the present square.
struct Squares : Plain {
  static const int slots = 1;
  kt_real lr, l2, eps, rate, keep, pull, momentum;
  bool lagged;
  KT_DEVICE void make(const Given& h) {
    lr = h[0], l2 = h[1], eps = h[2], rate = h[3], keep = 1.0 - h[3], pull = h[4], lagged = h[5] != 0.0, momentum = h[6];
  }
  KT_DEVICE kt_real direction(kt_real p, kt_real g, kt_real& v) const {
    g = g + l2 * p;
    kt_real now = v + rate * (g * g - pull * v);
    v = lagged ? v : now;
    kt_real d = g / (root(v) + eps);
    v = now;
    return d;
  }
  // With the root of the variance, kept by the recursion of West (1979), in place of that of the squares.
  KT_DEVICE kt_real centered(kt_real p, kt_real g, kt_real& variance, kt_real& mean) const {
    g = g + l2 * p;
    kt_real off = g - mean;
    variance = variance + rate * (keep * (off * off) - variance);
    mean = mean + rate * off;
    return g / (root(variance) + eps);
  }
  KT_DEVICE kt_real step(kt_real p, kt_real g, const kt_real*, kt_real* s) const {
    kt_real v = s[0], d = direction(p, g, v);
    s[0] = flush(v);
    return p - lr * d;
  }
};

// With momentum: velocity <- momentum velocity + direction; p <- p - lr velocity.
struct SquaresMomentum : Squares {
  static const int slots = 2;
  KT_DEVICE kt_real step(kt_real p, kt_real g, const kt_real*, kt_real* s) const {
    kt_real v = s[0], d = direction(p, g, v), velocity = momentum * s[1] + d;
    s[0] = flush(v), s[1] = flush(velocity);
    return p - lr * velocity;
  }
};

// With the variance of the gradients in place of their squares (Graves 2013, arXiv:1308.0850).
struct Centered : Squares {
  static const int slots = 2;
  KT_DEVICE kt_real step(kt_real p, kt_real g, const kt_real*, kt_real* s) const {
    kt_real variance = s[0], mean = s[1], d = centered(p, g, variance, mean);
    s[0] = flush(variance), s[1] = flush(mean);
    return p - lr * d;
  }
};

struct CenteredMomentum : Squares {
  static const int slots = 3;
  KT_DEVICE kt_real step(kt_real p, kt_real g, const kt_real*, kt_real* s) const {
    kt_real variance = s[0], mean = s[1], d = centered(p, g, variance, mean), velocity = momentum * s[2] + d;
    s[0] = flush(variance), s[1] = flush(mean), s[2] = flush(velocity);
    return p - lr * velocity;
  }
};

// RMSprop over the last squares: p <- p - lr g / (sqrt(past sum + now g^2) + eps).
struct Windowed : Plain {
  static const int windows = 1;
  kt_real lr, l2, eps, past, now, momentum;
  KT_DEVICE void make(const Given& h) { lr = h[0], l2 = h[1], eps = h[2], past = h[3], now = h[4], momentum = h[5]; }
  KT_DEVICE kt_real direction(kt_real p, kt_real g, kt_real sum, kt_real& square) const {
    g = g + l2 * p;
    square = g * g;
    return g / (root(past * sum + now * square) + eps);
  }
  KT_DEVICE kt_real step(kt_real p, kt_real g, const kt_real* sums, kt_real* s) const {
    kt_real square, d = direction(p, g, sums[0], square);
    s[0] = flush(square);
    return p - lr * d;
  }
};

struct WindowedMomentum : Windowed {
  static const int slots = 1;
  KT_DEVICE kt_real step(kt_real p, kt_real g, const kt_real* sums, kt_real* s) const {
    kt_real square, d = direction(p, g, sums[0], square), velocity = momentum * s[1] + d;
    s[0] = flush(square), s[1] = flush(velocity);
    return p - lr * velocity;
  }
};

// Adadelta (Zeiler 2012, arXiv:1212.5701): v <- v + rate (g^2 - v); d = g sqrt((u + eps) / (v + eps));
// u <- u + rate (d^2 - u); p <- p - lr d.
struct Adadelta : Plain {
  static const int slots = 2;
  kt_real lr, l2, eps, rate;
  KT_DEVICE void make(const Given& h) { lr = h[0], l2 = h[1], eps = h[2], rate = 1.0 - h[3]; }
  KT_DEVICE kt_real step(kt_real p, kt_real g, const kt_real*, kt_real* s) const {
    kt_real v = s[0], u = s[1];
    g = g + l2 * p;
    v = v + rate * (g * g - v);
    kt_real d = g * root((u + eps) / (v + eps));
    s[0] = flush(v), s[1] = flush(u + rate * (d * d - u));
    return p - lr * d;
  }
};

// Adadelta over the last squares, and the squared updates older than the last, which lies in a slot of its own.
struct WindowedDelta : Plain {
  static const int windows = 2, slots = 1;
  kt_real lr, l2, eps, past, now, older, last;
  KT_DEVICE void make(const Given& h) {
    lr = h[0], l2 = h[1], eps = h[2], past = h[3], now = h[4], older = h[5], last = h[6];
  }
  KT_DEVICE kt_real step(kt_real p, kt_real g, const kt_real* sums, kt_real* s) const {
    g = g + l2 * p;
    kt_real square = g * g, r = past * sums[0] + now * square, q = older * sums[1] + last * s[2];
    kt_real d = g * root((q + eps) / (r + eps));
    s[0] = flush(square), s[1] = s[2], s[2] = flush(d * d);
    return p - lr * d;
  }
};

// --------------------------------------------------------------------------- the kernel

typedef KT_RULE Rule;
const int WINDOWS = Rule::windows, STATE = Rule::windows + Rule::slots;

// Elements that move together: 16 bytes in the arithmetic's type, or in 16 bits where all that is written has them.
const bool KT_NARROW = sizeof(KT_T) == 2 && !KT_MASTERS && (STATE == 0 || sizeof(KT_S) == 2);
const int KT_V = KT_NARROW ? 8 : 16 / sizeof(kt_real);
// Blocks of 256 threads that a multiprocessor has registers for: four, or fewer of the steps that need many.
const int KT_SPARED = (STATE + WINDOWS + KT_MASTERS > 2) + (KT_NARROW && STATE + WINDOWS > 1) + (KT_NARROW && Rule::ahead);
const int KT_BLOCKS = sizeof(kt_real) == 8 ? 2 : 4 - KT_SPARED;

// A group's rule, and what happens to a gradient before the rule sees it: clamp(g * scale, +- limit). A negative row says
// that the step is skipped.
struct Made {
  Rule rule;
  kt_real scale, limit;
  int oldest;
  KT_DEVICE void make(const Given& h) {
    scale = h.at(0), limit = h.at(1), oldest = (int)h.at(2);
    rule.make(h);
  }
};

// Where the arrays of a chunk begin. `s` are the changed numbers of state, `past` the windows.
struct Place {
  KT_T* p;
  const KT_G* g;
  KT_S* s[CHANGED];
  const KT_S* past[CHANGED];
  kt_real* masters;
};

KT_DEVICE Place place_of(const Tensor& t, long long at, int oldest) {
  Place place;
  place.p = (KT_T*)t.p + at;
  place.g = (const KT_G*)t.g + at;
  place.masters = (kt_real*)t.masters + at;
#pragma unroll
  for (int w = 0; w < WINDOWS; ++w) {
    place.past[w] = (const KT_S*)t.windows[w] + at;
    place.s[w] = (KT_S*)t.windows[w] + oldest * t.stride + at;
  }
#pragma unroll
  for (int k = WINDOWS; k < STATE; ++k) place.s[k] = (KT_S*)t.slots[k - WINDOWS] + at;
  return place;
}

// The sum of a window's rows, from the oldest to the newest: a running sum that loses its oldest term cancels.
template <int V> KT_DEVICE Vec<kt_real, V> sum_of(const KT_S* window, int rows, long long stride, int oldest) {
  Vec<kt_real, V> sum;
#pragma unroll
  for (int v = 0; v < V; ++v) sum.v[v] = kt_real(0);
  int row = oldest;
#pragma unroll 4
  for (int i = 0; i < rows; ++i) {
    Vec<kt_real, V> x = load_wide<V>(window + row * stride);
#pragma unroll
    for (int v = 0; v < V; ++v) sum.v[v] = sum.v[v] + x.v[v];
    row = row + 1 == rows ? 0 : row + 1;
  }
  return sum;
}

template <int V> KT_DEVICE void update(const Place& at, const Tensor& t, const Made& made, int i) {
  Vec<kt_real, V> g = load_wide<V>(at.g + i), p, s[CHANGED], past[CHANGED];
  if (KT_MASTERS) p = load<V>(at.masters + i);
  else p = load_wide<V>(at.p + i);
#pragma unroll
  for (int k = WINDOWS; k < STATE; ++k) s[k] = load_wide<V>(at.s[k] + i);
#pragma unroll
  for (int w = 0; w < WINDOWS; ++w) past[w] = sum_of<V>(at.past[w] + i, t.rows, t.stride, made.oldest);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    kt_real own[CHANGED], sums[CHANGED];
#pragma unroll
    for (int k = WINDOWS; k < STATE; ++k) own[k] = s[k].v[v];
#pragma unroll
    for (int w = 0; w < WINDOWS; ++w) sums[w] = past[w].v[v];
    p.v[v] = made.rule.step(p.v[v], clamp(g.v[v] * made.scale, made.limit), sums, own);
#pragma unroll
    for (int k = 0; k < STATE; ++k) s[k].v[v] = own[k];
  }
  if (KT_MASTERS) store<V>(at.masters + i, p);
  store<V>(at.p + i, narrow_all<KT_T, V>(p));
#pragma unroll
  for (int k = 0; k < STATE; ++k) store<V>(at.s[k] + i, narrow_all<KT_S, V>(s[k]));
}

// Updates n elements of a tensor from a place on, V at a time.
template <int V> KT_DEVICE void run(const Tensor& t, const Made& made, long long from, int n) {
  const Place at = place_of(t, from, made.oldest);
#pragma unroll 1
  for (int i = kt_lane() * V; i < n; i += 32 * V) update<V>(at, t, made, i);
}

// Warps take chunks in turn; h has a row of scalars for each group.
KT_KERNEL(256, KT_BLOCKS) step(const Tensor* tensors, const Chunk* chunks, int count, int groups, Scalars<KT_H> h) {
  KT_SHARED(Made, made, GROUPS);
  if (threadIdx.x < groups) made[threadIdx.x].make(Given{h, (int)threadIdx.x});
  __syncthreads();
  for (int c = kt_first_chunk(); c < count; c += kt_warps()) {
    const Chunk chunk = chunks[c];
    const Tensor& t = tensors[chunk.tensor];
    const Made& own = made[t.group];
    if (own.oldest < 0) continue;
    const int n = chunk.length(t), whole = t.wide ? n / KT_V * KT_V : 0;
    run<KT_V>(t, own, chunk.from(), whole);
    run<1>(t, own, chunk.from() + whole, n - whole);
  }
}
