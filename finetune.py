"""Fine-tune a model folder on GLUE: python finetune.py --model FOLDER --tasks sst2. The same as `ufbert finetune`."""

import sys

from ufbert.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
