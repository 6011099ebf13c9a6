"""Pretrain a model within a budget: python train.py --budget=24h. The same as `ufbert train`."""

import sys

from ufbert.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
