"""`ufbert bench train`: pretraining timed against PyTorch, on a CPU or on a graphics card."""
