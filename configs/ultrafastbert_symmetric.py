"""UltraFastBERT-1x11 with neurons as loud on the left as on the right, so that no subtree dies of silence.

Paper: the dying is described in arXiv 2604.08565 ("auto-pruning from hard routing and an asymmetric nonlinearity"); the
architecture is arXiv 2311.10770's.
Command: python train.py --config=ultrafastbert_symmetric --budget=24h
Expected: fewer dead subtrees (`usage` in metrics.jsonl) than ultrafastbert_1x11; whether the loss follows is open.
Cost: as ultrafastbert_1x11, 163,671,025 parameters.
"""

from dataclasses import replace

from ufbert.presets import load_preset

plain = load_preset("ultrafastbert_1x11")
config = replace(
    plain, model=replace(plain.model, tree_activation="symmetric_gelu", tree_init="uniform", tree_balance=0.01)
)
