"""A modern encoder that Hugging Face's own ModernBERT class can express: RoPE, GeGLU, pre-norm, no biases.

Paper: Warner et al. 2024, "Smarter, Better, Faster, Longer", arXiv 2412.13663, with every layer global.
Command: python train.py --config=modern_hf --budget=24h, then ufbert export FOLDER --to hf --out DIR
Expected: a model that transformers loads without remote code.
Cost: 120,186,368 parameters.
"""

from ufbert.config import ModelConfig, RunConfig

config = RunConfig(
    model=ModelConfig(
        positions="rotary",
        rotary_base=160000.0,
        first_norm=False,
        norm_bias=False,
        norm_eps=1e-5,
        head_transform=True,
        head_bias=True,
        pooler="transform",
        pooler_width=768,
    )
)
