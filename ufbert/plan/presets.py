"""`ufbert presets`."""

from ufbert import nn
from ufbert.config.presets import load_preset, preset_names, preset_summary
from ufbert.cost.flops import forward_flops_per_token, neurons, train_flops_per_token
from ufbert.options.train import PresetsOptions


def list_presets(options: PresetsOptions) -> None:
    """Print a line for every preset."""
    print(f"{'':<20} {'':>12} {'MFLOP per token':>19} {'neurons used':>16}")
    print(f"{'preset':<20} {'parameters':>12} {'training':>9} {'inference':>9} {'of a layer':>16}  what it is")
    for name in preset_names():
        run = load_preset(name)
        active, all_neurons = neurons(run.model)
        train = train_flops_per_token(run, masked_trees=True) / 1e6
        infer = forward_flops_per_token(run.model, run.data.seq_len, masked_trees=False, training=False) / 1e6
        parameters, used = f"{nn.count_params(run.model):,}", f"{active:,} of {all_neurons:,}"
        print(f"{name:<20} {parameters:>12} {train:>9,.1f} {infer:>9,.1f} {used:>16}  {preset_summary(name)}")
