"""BERT-base: 12 post-norm layers, learned positions, token types, biases everywhere.

Paper: Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers", arXiv 1810.04805.
Command: python train.py --config=bert_base --budget=24h
Expected: the architecture of the original under the crammed recipe; one day is far from its 40 epochs.
Cost: 109,514,298 parameters as a masked language model, 109,482,240 as an encoder with its pooler.
"""

from ufbert.config import ModelConfig, RunConfig

config = RunConfig(
    model=ModelConfig(
        vocab_size=30522,
        max_len=512,
        n_layers=12,
        feedforward=("dense",),
        d_hidden=3072,
        norm="post",
        positions="learned",
        n_token_types=2,
        use_bias=True,
        final_norm=False,
        head_transform=True,
        head_bias=True,
        pooler_width=768,
    )
)
