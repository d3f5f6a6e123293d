"""Text and token ids: tokenizer, chat template, stop tokens and stop strings, streaming detokenisation."""
