"""The LoRA adapter: which layers it adapts, how it is saved, sampled and chatted with. What is saved opens with plain
PEFT. Used by the recipe, `ask` and `chat`."""
