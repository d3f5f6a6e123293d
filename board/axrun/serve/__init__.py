"""axrun serve: OpenAI's HTTP API for one bundle.

A request goes `app` -> `schema`, `validate` -> `order` -> `scheduler`, `slots` -> `writer` -> `answer` -> `app`.
One thread owns the model and runs one engine step per busy slot, round-robin; an event loop handles HTTP.
"""
