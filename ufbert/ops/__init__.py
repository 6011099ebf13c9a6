"""Pure array functions: no Flax, no files, no globals. Letters in shapes: see "Find your way" in the README."""
