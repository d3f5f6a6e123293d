"""A conversation with a person: turns that stay in the cache, lines and commands, a terminal."""
