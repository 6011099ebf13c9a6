"""FNet whose last two layers attend: most of the speed, most of BERT's accuracy.

Paper: Lee-Thorp et al. 2021, arXiv 2105.03824, section 4.3 (the TOP layout).
Command: python train.py --config=fnet_hybrid --budget=24h
Expected: the paper reports 97 to 99 % of BERT's GLUE average.
Cost: FNet's and four 768 x 768 matrices in each of two layers: 87,619,328 parameters.
"""

from dataclasses import replace

from ufbert.config.presets import load_preset

fnet = load_preset("fnet")
config = replace(fnet, model=replace(fnet.model, mixer=("fourier",) * 10 + ("attention",) * 2))
