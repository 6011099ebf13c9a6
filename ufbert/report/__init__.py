"""Pages to look at after a run. Reads the folders of runs and sweeps only."""
