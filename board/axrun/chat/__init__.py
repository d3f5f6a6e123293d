"""axrun chat: conversations that stay in the KV cache, commands, terminal input and output."""
