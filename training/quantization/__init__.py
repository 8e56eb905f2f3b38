"""4 bits means 4 bits: NF4 weights, including a mixture's experts, and their copy on disk. Used by `base`."""
