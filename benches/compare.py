"""kilter beside NumPy, PyTorch and JAX, as far as they are installed: `python benches/compare.py [PART ...]`.

PyTorch appears twice. By default the system takes freed memory back, and a new result pays for its pages
again; the second table is of a process whose malloc keeps them.
"""

import argparse
import os
import subprocess
import sys

from kilter import bench
from kilter.bench.peers import installed

PARTS = ("norms", "optim", "init", "train")
PEERS = ("numpy", "torch", "jax")
KEEP_PAGES = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "536870912",
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--kept", action="store_true", help="this process runs with the malloc that keeps pages")
    options = parser.parse_args(argv)
    parts = options.parts or PARTS
    found = [peer.name for peer in installed(options.peers)]
    for name in options.peers:
        if name not in found:
            print(f"{name}: not installed, left out")
    if options.kept:
        print("malloc keeps its pages:")
    for part in parts:
        bench.main(part, found)
    if "torch" in found and not options.kept:
        sys.stdout.flush()
        command = [sys.executable, __file__, *parts, "--kept", "--peers", "torch"]
        subprocess.run(command, env=os.environ | KEEP_PAGES, check=True)


if __name__ == "__main__":
    main()
