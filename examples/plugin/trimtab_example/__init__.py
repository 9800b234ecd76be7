"""A task and three methods for Trimtab, one file each."""
