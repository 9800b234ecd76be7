"""Everything behind the `trimtab` command. Nothing outside of this package imports it."""
