"""Which tests look at a kernel file, quickly; and faults that are always tried."""

_WALK, _BATCH = "tests/test_cuda_walk.py", "tests/test_cuda_batch.py"

# For each file, arguments of pytest: tests that run every kernel and path in some seconds.
SUITES = {
    "batch.cu": (_WALK, "-k", "test_batch and twice"),
    "batch.cuh": (_WALK, "tests/test_norm_edges.py", "-k", "test_batch or relu_at_zero and cuda"),
    "batch_cluster.cu": (_WALK, _BATCH, "-k", "test_batch and cluster or test_clusters_of_every_size"),
    "batch_resident.cu": (_WALK, _BATCH, "-k", "test_batch and resident or test_groups_take_tiles_in_turn"),
    "channels.cuh": (_WALK, "-k", "test_batch"),
    "common.cuh": (_WALK,),
    "fill.cu": (_WALK, "-k", "test_fills"),
    "flat.cu": (_WALK, "-k", "test_flat"),
    "grads.cu": (_WALK, "-k", "test_steps"),
    "groups.cu": (_WALK, "-k", "test_groups"),
    "groups.cuh": (_WALK, "-k", "test_groups"),
    "groups_once.cu": (_WALK, "-k", "test_groups"),
    "loss.cu": (_WALK, "-k", "test_losses"),
    "optim.cu": (_WALK, "tests/test_optim.py", "-k", "test_steps or test_zero_gradients and cuda"),
    "rows.cu": (_WALK, "-k", "test_rows or test_groups"),
    "rows.cuh": (_WALK, "-k", "test_rows or test_groups"),
    "rows_backward.cu": (_WALK, "-k", "test_rows or test_groups"),
    "rows_long.cu": (_WALK, "-k", "test_rows or test_groups"),
    "sums.cu": (_WALK, "-k", "test_rows or test_groups"),
    "tensors.cuh": (_WALK, "-k", "test_steps"),
    "tick.cu": (_WALK, "-k", "test_steps_that_are_measured"),
}


def _at(case):
    return f"{_WALK}::test_{case}"


# File, what stands there once, what is put in its place, and the test that must see it.
CHOSEN = (
    (  # sums of a block are read before every warp has written
        "common.cuh",
        "scratch[thread / 32 * N + k] = (double)sum;\n  }\n  __syncthreads();",
        "scratch[thread / 32 * N + k] = (double)sum;\n  }",
        _at("steps[0-sgd]"),
    ),
    (  # a warp's sum leaves out half of its lanes
        "common.cuh",
        "for (int offset = 16; offset > 0; offset >>= 1) x +=",
        "for (int offset = 16; offset > 1; offset >>= 1) x +=",
        _at("steps[0-sgd]"),
    ),
    (  # no block is the last
        "common.cuh",
        "== (unsigned)blocks - 1;",
        "== (unsigned)blocks;",
        _at("steps[0-sgd]"),
    ),
    (  # a lane that is not in its own mask
        "channels.cuh",
        "x += __shfl_xor_sync(KT_WARP, x, offset);",
        "x += __shfl_xor_sync(0x7fffffffu, x, offset);",
        _at("batch[planes-twice-plain]"),
    ),
    (  # what the first lanes bring is read too early
        "channels.cuh",
        "  }\n  __syncthreads();\n  return shared;",
        "  }\n  return shared;",
        _at("batch[planes-cluster-plain]"),
    ),
    (  # a block leaves its cluster, or writes, while others read
        "batch_cluster.cu",
        "kt_cluster_sync();  // none may leave or write before all have read",
        "",
        f"{_BATCH}::test_clusters_of_every_size[float32-4-(7, 2, 32, 24)]",
    ),
    (  # all threads write what one should
        "batch.cu",
        "if (c >= channels) return;",
        "if (c > channels) return;",
        _at("batch[odd columns-twice-plain]"),
    ),
    (  # the largest of a row's warps is looked for before they are there
        "loss.cu",
        "scratch[threadIdx.x / 32] = x;\n  __syncthreads();",
        "scratch[threadIdx.x / 32] = x;",
        _at("losses[labels-a block]"),
    ),
    (  # the sums of a row's warps are read before they are there
        "rows.cuh",
        "* N + k] = sum;\n  }\n  __syncthreads();",
        "* N + k] = sum;\n  }",
        _at("rows[many warps]"),
    ),
    (  # a warp's rows meet too few of their lanes
        "rows.cuh",
        "offset = blockDim.x / 2; offset > 0;",
        "offset = blockDim.x / 4; offset > 0;",
        _at("rows[a warp]"),
    ),
    (  # sums of columns are read before they are there
        "sums.cu",
        "= sum;\n  __syncthreads();",
        "= sum;",
        _at("rows[a block]"),
    ),
    (  # one position beyond a group
        "groups.cu",
        "if (group >= groups) return;",
        "if (group > groups) return;",
        _at("groups[last, twice]"),
    ),
    (  # scalars are read before they are made
        "optim.cu",
        "(int)threadIdx.x});\n  __syncthreads();",
        "(int)threadIdx.x});",
        _at("steps[0-sgd]"),
    ),
    (  # an element beyond a tensor
        "optim.cu",
        "i = kt_lane() * V; i < n;",
        "i = kt_lane() * V; i <= n;",
        _at("steps[0-sgd]"),
    ),
    (  # the clocks run on before it is known whether the step is skipped
        "tick.cu",
        "  }\n  __syncthreads();",
        "  }",
        _at("steps_that_are_measured"),
    ),
    (  # an element beyond an array
        "fill.cu",
        "start + 16 * k < n)",
        "start + 16 * k <= n)",
        _at("fills[17-float32]"),
    ),
)
