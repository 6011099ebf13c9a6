"""GLUE: tasks, where their rows come from, metrics, and fine-tuning."""
