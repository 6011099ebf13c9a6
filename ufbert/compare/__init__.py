"""Comparisons: presets side by side, in pretraining, on GLUE and in speed, with a verdict."""
