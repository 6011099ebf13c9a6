"""Pretrain a model within a budget: python train.py --budget=24h. The same as `ufbert train`."""

import sys

from ufbert.cli import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
