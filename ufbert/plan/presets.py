"""`ufbert presets`."""

from ufbert import nn
from ufbert.config.presets import load_preset, preset_names, preset_summary
from ufbert.cost.flops import forward_flops_per_token, neurons
from ufbert.options.train import PresetsOptions
from ufbert.plan.counts import planned_flops, planned_model
from ufbert.plan.target import start_target


def list_presets(options: PresetsOptions) -> None:
    """Print a line for every preset. Raises UserError for a device that is not known."""
    target = start_target(options.device)
    print(f"counted for {target.name}, and in training for the tree backend in brackets")
    print(f"{'':<20} {'':>12} {'MFLOP per token':>28} {'neurons used':>16}")
    print(f"{'preset':<20} {'parameters':>12} {'training':>18} {'inference':>9} {'of a layer':>16}  what it is")
    for name in preset_names():
        run = load_preset(name)
        run = planned_model(run, dtype=target.dtype, trees=target.trees(run))
        active, all_neurons = neurons(run.model)
        backend = f" ({run.model.tree_backend})" if "tree" in run.model.feedforward else ""
        train = f"{planned_flops(run) / 1e6:,.1f}{backend}"
        infer = forward_flops_per_token(run.model, run.data.seq_len, masked_trees=False, training=False) / 1e6
        parameters, used = f"{nn.count_params(run.model):,}", f"{active:,} of {all_neurons:,}"
        print(f"{name:<20} {parameters:>12} {train:>18} {infer:>9,.1f} {used:>16}  {preset_summary(name)}")
