"""Model folders, their names on the Hugging Face hub, and the layouts of other libraries."""
