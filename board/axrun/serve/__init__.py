"""axrun serve: OpenAI's and Ollama's HTTP APIs for one or several bundles.

A request goes `app` -> `schema`, `validate` -> `order` -> `scheduler`, `room`, `slots` -> `writer` -> `answer`.
For each model, one thread runs the engine for all busy slots; an event loop handles HTTP.
"""
