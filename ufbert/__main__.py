"""`python -m ufbert VERB`."""

from ufbert.cli import run

if __name__ == "__main__":
    run()
