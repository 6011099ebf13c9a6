"""Trees whose inner nodes only decide and whose leaves hold 64 neurons, with 53 that every token uses besides.

Paper: none; leaves and shared neurons are those of DeepSeekMoE (arXiv 2401.06066) on the decisions of a fast feedforward
(arXiv 2308.14711). It is the better of the two routed trees in docs/results/pretraining.md.
Command: python train.py --config=routed_tree --recipe=modern --budget=24h
Expected: after 40 M tokens at `small`, 3.163 nats where a dense layer of the 122 neurons that a token uses has 3.143.
Cost: 163,741,169 parameters; 122 of 2,132 neurons a token.
Its control is a dense layer of as many: --model.feedforward dense --model.hidden-from routed_path.
"""

from dataclasses import replace

from ufbert.config.presets import load_preset

crammed = load_preset("crammed_bert")
config = replace(
    crammed,
    model=replace(
        crammed.model,
        feedforward=("routed_tree",),
        n_trees=1,
        tree_depth=5,
        leaf_width=64,
        master_leaf=53,
        leaf_ancestors="levels",
    ),
)
