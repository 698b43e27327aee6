// Many tensors in one launch: a table of them on the device, cut into chunks, of which each warp takes some.

// Few enough elements that thousands of small tensors fill the device, so many that finding them costs little. Places in a
// tensor are 64 bits wide, those in a chunk 32.
const int KT_CHUNK = 1024;

struct Tensor {
  void* p;           // parameters
  const void* g;     // gradients
  void* slots[3];    // numbers of state that change at each step
  void* windows[2];  // `rows` rows of state, `stride` elements apart, of which the oldest is replaced
  void* masters;     // exact copies of the parameters
  long long n, stride;
  int rows, group;    // the tensors of a group have scalars of their own
  int wide, wide_g;   // whether the arrays are aligned for vectors of the arithmetic's type, and g (or p) for 16 bytes
};

struct Chunk {
  int tensor, number;
  KT_DEVICE long long from() const { return (long long)number * KT_CHUNK; }
  KT_DEVICE int length(const Tensor& t) const { return t.n - from() < KT_CHUNK ? (int)(t.n - from()) : KT_CHUNK; }
};

// The chunks of a warp: for (int c = kt_first_chunk(); c < count; c += kt_warps()).
KT_DEVICE int kt_first_chunk() { return (blockIdx.x * blockDim.x + threadIdx.x) / 32; }
KT_DEVICE int kt_warps() { return gridDim.x * (blockDim.x / 32); }

// The elements of a warp in a run of n, V at a time: for (int i = kt_lane() * V; i < n; i += 32 * V).
KT_DEVICE int kt_lane() { return threadIdx.x % 32; }
