"""FNet-base: attention replaced by a Fourier transform over tokens and channels, nothing learned in it.

Paper: Lee-Thorp et al. 2021, "FNet: Mixing Tokens with Fourier Transforms", arXiv 2105.03824.
Command: python train.py --config=fnet --budget=24h
Expected: the paper reports 92 % of BERT's GLUE average at 80 % more training speed, at rows of 512; less speed at 128.
Cost: 82,894,592 parameters; no mask exists, so every row has exactly 128 tokens in training and in use.
"""

from ufbert.config import ModelConfig, RunConfig

config = RunConfig(
    model=ModelConfig(
        vocab_size=32000,
        max_len=512,
        fixed_len=128,
        n_layers=12,
        mixer=("fourier",),
        feedforward=("dense",),
        d_hidden=3072,
        activation="gelu_tanh",
        norm="post",
        positions="learned",
        n_token_types=4,
        use_bias=True,
        embedding_projection=True,
        final_norm=False,
        head_transform=True,
        head_bias=True,
        pooler_width=768,
    )
)
