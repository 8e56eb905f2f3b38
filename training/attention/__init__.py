"""Attention of packed rows: texts that lie end to end, each of which sees only itself. `training.recipe` chooses it for
a model before packing is decided; transformers calls what is registered."""
