"""Text to batches: corpora, tokenizer, packed rows, seeded order."""
