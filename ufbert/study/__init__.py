"""Studies: variants of a pretraining run compared under one protocol, cell by cell."""
