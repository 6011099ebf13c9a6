"""The layouts of other libraries, one file each."""
