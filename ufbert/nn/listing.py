"""`ufbert presets`."""

from dataclasses import dataclass

from ufbert.presets import load_preset, preset_names, preset_summary


@dataclass(frozen=True)
class PresetsOptions:
    """List the presets: name, parameters as a masked language model, feedforward neurons used of those there, summary."""


def presets_command(args: list[str]) -> None:
    """`ufbert presets`."""
    import tyro

    tyro.cli(PresetsOptions, args=args, prog="ufbert presets")
    from ufbert import nn

    print(f"{'preset':<22} {'parameters':>13}  {'neurons used':>14}  what it is")
    for name in preset_names():
        model = load_preset(name).model
        if "tree" in model.feedforward:
            used = f"{model.n_trees * (model.tree_depth + 1)} of {model.n_trees * model.nodes_per_tree}"
        else:
            used = f"{model.d_hidden} of {model.d_hidden}"
        print(f"{name:<22} {nn.count_params(model):>13,}  {used:>14}  {preset_summary(name)}")
