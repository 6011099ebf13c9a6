"""Dense feedforwards as trees: decisions (`splits`), neurons, whole models (`children`), and the method of the command."""
