"""Text and token ids: the tokenizer, the chat template, what stops an answer, text from tokens as they come."""
