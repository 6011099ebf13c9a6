"""Pretraining within a budget: `command` (options) -> `run` (files) -> `loop` (order of events) -> `step` (mathematics)."""
