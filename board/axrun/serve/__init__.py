"""axrun serve: a bundle behind OpenAI's HTTP interface.

A request goes `app` -> `schema`, `validate` -> `order` -> `scheduler`, `slots` -> `writer` -> `answer` -> `app`.
One thread owns the model and takes one engine step at a time, in turn for every slot; an event loop talks HTTP.
"""
