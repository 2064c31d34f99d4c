"""The embedding cache at size: opening 1,000,000 vectors, looking up and reading 100,000 keys, appending, against a
folder of single .npy files for the reading.

    python tests/benchmarks/bench_cache.py   # needs 3 GB of disk in the temporary folder, or in --folder
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402

OPEN = """
import resource, sys, time
sys.path.insert(0, {root!r})
import numpy as np, train
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
keys, before, start = np.load({keys!r}), resident(), time.perf_counter()
cache = train.EmbeddingCache({folder!r}, 768)
opened, after, start = time.perf_counter() - start, resident(), time.perf_counter()
rows = cache.locate(keys)
located, start = time.perf_counter() - start, time.perf_counter()
assert (rows >= 0).all() and (cache.locate(keys ^ 1) < 0).all()
start = time.perf_counter()
vectors = cache.take(rows)
print(opened, after - before, after, located, time.perf_counter() - start)
"""


def fill(folder, count, part, random):
    """`count` random vectors in parts of `part`; returns all keys and the seconds that appending took."""
    cache, keys, seconds = train.EmbeddingCache(folder, 768), [], 0.0
    for start in range(0, count, part):
        size = min(part, count - start)
        keys.append(random.integers(0, 256, (size, 16), dtype=np.uint8))
        vectors = random.standard_normal((size, 768), dtype=np.float32)
        begin = time.perf_counter()
        cache.append(keys[-1], vectors)
        seconds += time.perf_counter() - begin
    return np.concatenate(keys), seconds


def single_files(folder, count, random):
    """Seconds to read `count` vectors from a folder of single .npy files, as earlier users have it."""
    names = [Path(folder) / f"{i:032x}.npy" for i in range(count)]
    for name in names:
        np.save(name, random.standard_normal(768, dtype=np.float32))
    start = time.perf_counter()
    for name in names:
        np.load(name)
    return time.perf_counter() - start


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--vectors", type=int, default=1_000_000)
    options.add_argument("--lookups", type=int, default=100_000)
    options.add_argument("--part", type=int, default=20_000, help="vectors in one part")
    options.add_argument("--folder", help="where to write (default: the temporary folder)")
    options = options.parse_args()
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        keys, seconds = fill(Path(scratch) / "cache", options.vectors, options.part, random)
        print(f"append {options.vectors:,} vectors: {seconds:.1f} s")
        np.save(Path(scratch) / "keys.npy", random.permutation(keys)[: options.lookups])
        code = OPEN.format(root=str(ROOT), keys=scratch + "/keys.npy", folder=scratch + "/cache")
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        opened, grown, resident, located, taken = map(float, answer.split())
        print(f"open: {opened:.2f} s, {grown:.0f} MB more resident memory ({resident:.0f} MB with Python and torch)")
        print(f"look up {options.lookups:,} keys: {located:.3f} s; read their vectors: {taken:.2f} s")
        few = max(1, options.lookups // 10)
        single = single_files(scratch, few, random) * options.lookups / few
        print(f"the same from single .npy files: {single:.1f} s (from {few:,}), {single / (located + taken):.0f} times")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}; Python {platform.python_version()}, "
        f"numpy {np.__version__}"
    )


if __name__ == "__main__":
    main()
