"""Run-time shape checks on every function of the package, and strict JAX, before anything is imported."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "1")  # one XLA thread per pytest worker

from jaxtyping import install_import_hook

install_import_hook("ufbert", "beartype.beartype")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
