"""4 bits means 4 bits: NF4 weights, the experts of a mixture included, and their copy on disk. Used by `base`."""
