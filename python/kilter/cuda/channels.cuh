// One statistic per channel of an array (outer, channels, inner): which elements a thread has, and how a block's threads
// put their sums together. For texts that begin with `#include "channels.cuh"`; macros:
//
// KT_COLUMNS 0, planes: a block has a part of one channel. Its positions are vectors of V elements, outer * inner / V.
// KT_COLUMNS 1, columns: a matrix of `outer` rows, in which a channel is `inner` adjacent columns: 1 where channels are
//   last, the whole plane where planes are small. A block has a part of the rows of `lanes` adjacent vectors, which are
//   whole channels; a thread keeps to the V columns of its vector. Positions are rows.
// KT_THREADS is the most threads of a block, whole warps. Offsets have 64 bits everywhere: they are counted once a vector.
#ifndef KT_COLUMNS
#define KT_COLUMNS 0
#endif
#ifndef KT_V
#define KT_V 1
#endif
#ifndef KT_THREADS
#define KT_THREADS 256
#endif
#define KT_RESIDENT (KT_COLUMNS ? 1 : 3)  // blocks of a multiprocessor, at least

#if KT_COLUMNS
const int KT_A = KT_V;   // the sums that a thread keeps: one for each of its columns,
typedef kt_real kt_sum;  // over so few rows that this type holds them
#else
const int KT_A = 1;
typedef double kt_sum;
#endif
const int KT_MOST_CHANNELS = 256;  // of a block

// How the blocks of a launch share the array: tiles of whole channels, `parts` blocks for each, `per` positions for a part.
struct Split {
  int channels;
  long long inner, positions, per;
  int parts, lanes;
};

// What this block has, and what this thread does for it: it sums for channel first + k, as lane j of `team` lanes.
struct Block {
  int tile, part, first, channels;
  long long start, stop;  // positions
  int team, k, j;
  int lane, row, rows;    // of columns: this thread's vector in the tile, its first row, and the rows that go at once
  bool idle;

  KT_DEVICE Block(const Split& split, int tile, int part) : tile(tile), part(part) {
    const int threads = blockDim.x, thread = threadIdx.x;
    start = part * split.per;
    stop = min(start + split.per, split.positions);
#if KT_COLUMNS
    const int most = split.lanes * KT_V / (int)split.inner;
    first = tile * most;
    channels = min(most, split.channels - first);
    lane = thread % split.lanes;
    row = thread / split.lanes;
    rows = threads / split.lanes;
    idle = row >= rows || lane * KT_V >= channels * (int)split.inner;
    team = 32;
    while (team * most > threads) team /= 2;
#else
    first = tile;
    channels = 1;
    lane = 0;
    row = thread;
    rows = threads;
    idle = false;
    team = 32;
#endif
    k = thread / team;
    j = thread % team;
  }

  // How many values of each channel are in `positions` of them.
  KT_DEVICE double values(const Split& split, long long positions) const {
    return (double)(positions < 0 ? 0 : positions) * (double)(KT_COLUMNS ? split.inner : KT_V);
  }

  // Of this thread's a-th sum: the channel, counted from `first`.
  KT_DEVICE int channel(const Split& split, int a) const {
    return KT_COLUMNS && !idle ? (lane * KT_V + a) / (int)split.inner : 0;
  }
};

// The positions of a thread, one after the other.
struct Walk {
  long long at, stop, offset;  // the position, the end, the first element
  int step, turn;              // positions from one to the next; how many came before
#if KT_COLUMNS
  long long jump;
#else
  long long jump, place, stride, plane, back;  // in vectors: the place in the plane, what is added to it, its end
#endif

  KT_DEVICE Walk(const Split& split, const Block& own) : stop(own.idle ? 0 : own.stop), step(own.rows), turn(0) {
    at = own.start + own.row;
    const long long row = split.channels * split.inner;
#if KT_COLUMNS
    jump = step * row;
    offset = at * row + (long long)own.first * split.inner + own.lane * KT_V;
#else
    plane = split.inner / KT_V;
    const long long n = at / plane;
    const int planes = plane > step ? 0 : step / (int)plane;
    place = at - n * plane;
    stride = step - planes * plane;
    jump = planes * row + stride * KT_V;
    back = row - split.inner;
    offset = n * row + own.first * split.inner + place * KT_V;
#endif
  }

  KT_DEVICE void next() {
    at += step;
    offset += jump;
    ++turn;
#if !KT_COLUMNS
    place += stride;
    if (place >= plane) {
      place -= plane;
      offset += back;
    }
#endif
  }
};

// U positions of a thread; all are there if WHOLE, else the first and perhaps more.
template <int U, bool WHOLE> struct Look {
  long long offset[U], at[U], stop;
  int turn;

  KT_DEVICE explicit Look(Walk& walk) : stop(walk.stop), turn(walk.turn) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      offset[u] = walk.offset;
      at[u] = walk.at;
      walk.next();
    }
  }

  KT_DEVICE bool has(int u) const { return WHOLE || at[u] < stop; }

  // The vectors of an array of x's shape; where a position is not there, those of the first.
  template <typename T> KT_DEVICE void read(const T* x, Vec<T, KT_V> (&to)[U]) const {
#pragma unroll
    for (int u = 0; u < U; ++u) to[u] = load<KT_V>(x + (has(u) ? offset[u] : offset[0]));
  }
};

// The weights of the values at one position: planes have one for each element, columns one for each row.
const int KT_W = KT_COLUMNS ? 1 : KT_V;
KT_DEVICE Vec<kt_real, KT_W> weights_at(const kt_real* weights, long long at) { return load<KT_W>(weights + at * KT_W); }

// Calls body(look) for all positions of a thread.
template <int U, typename Body> KT_DEVICE void each_look(Walk walk, const Body& body) {
  while (walk.at + (U - 1) * (long long)walk.step < walk.stop) body(Look<U, true>(walk));
  if (walk.at < walk.stop) body(Look<U, false>(walk));
}

// The sum over a team of lanes, the same bits in each; whole warps must call it.
KT_DEVICE double team_sum(double x, int team) {
  for (int offset = team / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(KT_WARP, x, offset);
  return x;
}

// The sum of what the block's threads have for a channel, in float64 and in a fixed order: in each thread that of its
// team's channel.
KT_DEVICE double channel_sum(const Split& split, const Block& own, const kt_sum (&x)[KT_A]) {
  KT_SHARED(kt_sum, scratch, KT_THREADS * KT_A);
  __syncthreads();
#pragma unroll
  for (int a = 0; a < KT_A; ++a) scratch[threadIdx.x * KT_A + a] = x[a];
  __syncthreads();
  double sum = 0.0;
  if (own.k < own.channels) {
#if KT_COLUMNS
    const int inner = (int)split.inner, row = split.lanes * KT_V;
    for (int i = own.j; i < own.rows * inner; i += own.team)
      sum += (double)scratch[i / inner * row + own.k * inner + i % inner];
#else
    for (int i = own.j; i < own.rows; i += own.team) sum += scratch[i];
#endif
  }
  return team_sum(sum, own.team);
}

// What the first lane of each team brings, for all threads; they have read what was there before the next such call.
template <int N> KT_DEVICE const kt_real* for_all(const Block& own, const kt_real (&x)[N]) {
  KT_SHARED(kt_real, shared, KT_MOST_CHANNELS * 6);
  __syncthreads();
  if (own.j == 0 && own.k < own.channels) {
#pragma unroll
    for (int n = 0; n < N; ++n) shared[own.k * N + n] = x[n];
  }
  __syncthreads();
  return shared;
}
