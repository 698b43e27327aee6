#include "rows.cuh"
// Groups of channels with channels last: what a block has of a sample, and sums over groups. For texts that begin with
// `#include "groups.cuh"`.

// What a block has of samples of `positions` rows of `channels`: `rows` of them, and of those a tile of channels, which are
// groups of `width` channels, or one of the `pieces` of a group. Threads have one vector of a row, in turns of `step` rows.
struct Tile {
  long long sample, start;  // where the first of its elements that are this thread's lies
  int part, parts;          // of the sample's positions
  int group, piece;         // the first group; the piece of it
  int first, channels;      // of the tile
  int lane, span, row, step, stop;

  KT_DEVICE Tile(int positions, int rows, int all, int width, int tile, int pieces) {
    const int tiles = pieces > 1 ? all / width * pieces : (all + tile - 1) / tile;
    parts = (positions + rows - 1) / rows;
    const long long block = blockIdx.x / tiles;
    const int number = blockIdx.x - (int)(block * tiles);
    sample = block / parts;
    part = (int)(block - sample * parts);
    group = pieces > 1 ? number / pieces : number * (tile / width);
    piece = pieces > 1 ? number % pieces : 0;
    first = group * width + piece * tile;
    channels = min(tile, (pieces > 1 ? (group + 1) * width : all) - first);
    span = tile / KT_V;
    lane = threadIdx.x % span;
    row = threadIdx.x / span;
    step = blockDim.x / span;
    stop = row < step && lane * KT_V < channels ? min(rows, positions - part * rows) : 0;
    start = (sample * positions + (long long)part * rows) * all + first + lane * KT_V;
  }

  // Puts N numbers for each place of this thread's vector into `stage`, of shape (step, N, tile).
  template <int N> KT_DEVICE void lay(const kt_real (&x)[N][KT_V], kt_real* stage) const {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int v = 0; v < KT_V; ++v) stage[((row * N + n) * span + lane) * KT_V + v] = x[n][v];
    }
  }

  // Writes the sums over rows of `stage` (N = 2) for the tile's channels, those of n = 1 `all` places behind.
  template <typename T> KT_DEVICE void add_rows(const kt_real* stage, T* to, int all) const {
    for (int j = threadIdx.x; j < 2 * channels; j += blockDim.x) {
      const int n = j >= channels, c = j - n * channels;
      double sum = 0.0;
      for (int r = 0; r < step; ++r) sum += stage[(2 * r + n) * span * KT_V + c];
      to[n * all + c] = (T)sum;
    }
  }
};

// The sums of N numbers that the block's threads have for each place of their vectors, over all rows and the `width`
// channels of each group of the tile: `sums` of shape (groups, N), for all threads.
template <int N>
KT_DEVICE void group_sums(const Tile& own, int width, const kt_real (&x)[N][KT_V], kt_real* stage, double* sums) {
  __syncthreads();
  if (own.row < own.step) own.lay(x, stage);
  __syncthreads();
  const int groups = own.channels / width, row = own.span * KT_V;
  int team = 32;
  while (team * groups > blockDim.x) team /= 2;
  const int group = threadIdx.x / team, j = threadIdx.x % team;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    double sum = 0.0;
    for (int i = j; i < width * own.step && group < groups; i += team) {
      sum += stage[(i / width * N + n) * row + group * width + i % width];
    }
    for (int offset = team / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(KT_WARP, sum, offset);
    if (group < groups && j == 0) sums[group * N + n] = sum;
  }
  __syncthreads();
}

// Calls use(v, group) for the channels of a vector.
template <typename F> KT_DEVICE void each_group(int channel, int width, const F& use) {
  int group = channel / width, room = (group + 1) * width - channel;
#pragma unroll
  for (int v = 0; v < KT_V; ++v) {
    use(v, group);
    if (--room == 0) {
      room = width;
      ++group;
    }
  }
}
