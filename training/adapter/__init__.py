"""The LoRA adapter: where it goes, how it is saved, how it is sampled and talked to."""
