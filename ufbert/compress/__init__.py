"""Smaller and faster children of a model folder, and what they lost."""
