"""Pure array functions: no Flax, no files, no globals. Letters in shapes: see CONTRIBUTING in the README."""
