"""UltraFastBERT-1x11 with neurons as loud on the left as on the right, against subtrees that die of silence.

Paper: the dying is described in arXiv 2604.08565 ("auto-pruning from hard routing and an asymmetric nonlinearity"); the
architecture is arXiv 2311.10770's.
Command: python train.py --config=ultrafastbert_symmetric --budget=24h
Expected: open. In the toy of notebooks/01_the_fff_layer the symmetric neurons even the turns and reopen silent halves, but
more subtrees die than with gelu where the target has a linear part; the balance loss is what saves them. Compare `usage`.
Cost: as ultrafastbert_1x11, 163,671,025 parameters.
"""

from dataclasses import replace

from ufbert.config.presets import load_preset

plain = load_preset("ultrafastbert_1x11")
config = replace(
    plain, model=replace(plain.model, tree_activation="symmetric_gelu", tree_init="uniform", tree_balance=0.01)
)
