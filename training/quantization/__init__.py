"""4 bits means 4 bits: NF4 weights, including a mixture's experts, and their copy on disk. A layer that would stay in
16 bits is refused by name. Used by `base`."""
