"""The LoRA adapter: which layers it adapts, how it is saved, sampled and chatted with."""
