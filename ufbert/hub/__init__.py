"""Model folders, and the layouts of other libraries."""
