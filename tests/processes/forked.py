"""Run train.py in two processes as torchrun would start them, forked from one that has imported it: half the work."""

import multiprocessing
import os
import sys

import train


def run(rank: int) -> None:
    """Be one of the two."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
    sys.exit(train.main(sys.argv[1:]))


processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(2)]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(max(process.exitcode or 0 for process in processes))
