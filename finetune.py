"""Fine-tune a model folder on GLUE: python finetune.py --model FOLDER --tasks sst2. The same as `ufbert finetune`."""

import sys

from ufbert.cli import run

if __name__ == "__main__":
    run(["finetune", *sys.argv[1:]])
