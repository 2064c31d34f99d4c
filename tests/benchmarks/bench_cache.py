"""The embedding cache at size: opening 1,000,000 vectors, looking up and reading 100,000 keys, appending, against a
folder of single .npy files for the reading. Seconds are CPU seconds.

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

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

asked, unknown = np.load({keys!r}).view(train.KEY)
before, start = resident(), time.process_time()
cache = train.EmbeddingCache({folder!r}, 768)
opened, after, start = time.process_time() - start, resident(), time.process_time()
rows = cache.locate(asked)
located = time.process_time() - start
assert (rows >= 0).all() and (cache.locate(unknown) < 0).all()
start = time.process_time()
vectors = cache.gather(asked)
taken = time.process_time() - start
assert vectors.shape == (len(asked), 768)
print(opened, after - before, after, located, taken)
"""


def fill(folder: Path, count: int, part: int, random: np.random.Generator) -> tuple[np.ndarray, float]:
    """Write `count` random vectors in parts of `part`; return all keys and the CPU seconds that appending took."""
    cache = train.EmbeddingCache(folder, 768)
    keys, seconds = [], 0.0
    for start in range(0, count, part):
        size = min(part, count - start)
        keys.append(np.frombuffer(random.bytes(16 * size), train.KEY))
        vectors = random.standard_normal((size, 768), dtype=np.float32)
        begin = time.process_time()
        cache.append(keys[-1], vectors)
        seconds += time.process_time() - begin
    return np.concatenate(keys), seconds


def single_files(folder: str, count: int, random: np.random.Generator) -> float:
    """Return the CPU seconds to read `count` vectors from a folder of single .npy files, as earlier users have it."""
    names = [Path(folder) / f"{i:032x}.npy" for i in range(count)]
    for name in names:
        np.save(name, random.standard_normal(768, dtype=np.float32))
    start = time.process_time()
    for name in names:
        np.load(name)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--lookups", type=int, default=100_000)
    parser.add_argument("--part", type=int, default=20_000, help="vectors in one part")
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        keys, seconds = fill(Path(scratch) / "cache", options.vectors, options.part, random)
        print(f"append {options.vectors:,} vectors: {seconds:.1f} s")
        asked = random.permutation(keys)[: options.lookups]
        unknown = np.frombuffer(random.bytes(16 * len(asked)), train.KEY)
        np.save(Path(scratch) / "keys.npy", np.stack([asked, unknown]).view(np.uint8))
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
