"""What a model's chat template makes of a conversation: renders it, finds the answers and their ends in the text, and
proves that each follows the prompt that a server would build. Used by training.data.chat_template."""
