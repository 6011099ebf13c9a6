"""FNet-base: attention replaced by a Fourier transform over tokens and channels, nothing learned in it.

Paper: Lee-Thorp et al. 2021, "FNet: Mixing Tokens with Fourier Transforms", arXiv 2105.03824.
Command: python train.py --config=fnet --budget=24h
Expected: the paper reports 92 % of BERT's GLUE average at 80 % more training speed, at rows of 512; less speed at 128.
Cost: 82,894,592 parameters; no mask exists, so every row has exactly 128 tokens in training and in use.
"""

from dataclasses import replace

from ufbert.config.presets import load_preset

bert = load_preset("bert_base")
config = replace(
    bert,
    model=replace(
        bert.model,
        vocab_size=32000,
        fixed_len=128,
        mixer=("fourier",),
        activation="gelu_tanh",
        n_token_types=4,
        embedding_projection=True,
    ),
)
