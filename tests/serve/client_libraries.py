"""Queries a server through client libraries, as in their documentation; prints each result as JSON.

    .venv-clients/bin/python tests/serve/client_libraries.py URL MODEL QUESTION

Run in the environment of requirements/clients.txt, without this repository on the path.
"""

from __future__ import annotations

import asyncio
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, Field

URL, NAME, QUESTION = sys.argv[1:4]
KEY = "unused"
LIMITS: dict[str, Any] = {"temperature": 0, "max_tokens": 600}


class Person(BaseModel):
    """A person. Other properties are allowed."""

    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=130)
    mood: Literal["good", "bad"] = "good"


def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"]}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {**CITY, "additionalProperties": False},
    },
}
MESSAGES: Any = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": QUESTION}]


def openai_client() -> Any:
    import openai

    return openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=300)


def openai_parse() -> Any:
    made = openai_client().chat.completions.parse(model=NAME, messages=MESSAGES, response_format=Person, **LIMITS)
    return made.choices[0].message.parsed.model_dump()


def openai_tools() -> Any:
    """A required call, its result sent back, and an answer after it."""
    client = openai_client()
    required = client.chat.completions.create(
        model=NAME, messages=MESSAGES, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, **LIMITS
    )
    message = required.choices[0].message
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": weather(**json.loads(call.function.arguments))}
    messages = [*MESSAGES, message, result]
    final = client.chat.completions.create(model=NAME, messages=messages, tools=[TOOL], temperature=0, max_tokens=4)
    return {"name": call.function.name, "finish": final.choices[0].finish_reason}


def openai_tools_streamed() -> Any:
    with openai_client().chat.completions.stream(
        model=NAME, messages=MESSAGES, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, **LIMITS
    ) as stream:
        kinds = {event.type for event in stream}
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    return {"name": call.function.name, "done": "tool_calls.function.arguments.done" in kinds}


def instructor_mode(mode: str) -> Any:
    import instructor

    client = instructor.from_openai(openai_client(), mode=instructor.Mode[mode])
    return client.create(model=NAME, messages=MESSAGES, response_model=Person, max_retries=0, **LIMITS).model_dump()


def langchain_chat() -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=NAME, base_url=f"{URL}/v1", api_key=KEY, max_retries=0, **LIMITS)


def langchain_structured(method: str) -> Any:
    return langchain_chat().with_structured_output(Person, method=method).invoke(QUESTION).model_dump()


def langchain_tools() -> Any:
    made = langchain_chat().bind_tools([TOOL], tool_choice="weather").invoke(QUESTION)
    (call,) = made.tool_calls
    return {"name": call["name"], "arguments": sorted(call["args"])}


def pydantic_ai() -> Any:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(NAME, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY))
    agent = Agent(model, output_type=Person, model_settings=LIMITS, instructions="You are brief.")
    return asyncio.run(agent.run(QUESTION)).output.model_dump()


def llm_schema() -> Any:
    from llm.default_plugins.openai_models import Chat

    model = Chat(NAME, model_name=NAME, api_base=f"{URL}/v1", supports_schema=True)
    response = model.prompt(QUESTION, schema=Person, key=KEY, temperature=0, max_tokens=600, stream=False)
    return json.loads(response.text())


CHECKS: dict[str, Callable[[], Any]] = {
    "openai.parse": openai_parse,
    "openai.tools": openai_tools,
    "openai.tools.stream": openai_tools_streamed,
    "instructor.TOOLS": lambda: instructor_mode("TOOLS"),
    "instructor.JSON": lambda: instructor_mode("JSON"),
    "instructor.JSON_SCHEMA": lambda: instructor_mode("JSON_SCHEMA"),
    "langchain.json_schema": lambda: langchain_structured("json_schema"),
    "langchain.function_calling": lambda: langchain_structured("function_calling"),
    "langchain.json_mode": lambda: langchain_structured("json_mode"),
    "langchain.bind_tools": langchain_tools,
    "pydantic_ai": pydantic_ai,
    "llm": llm_schema,
}


def main() -> None:
    results = {}
    for name in sys.argv[4:] or CHECKS:
        try:
            results[name] = CHECKS[name]()
        except BaseException:
            results[name] = f"failed: {traceback.format_exc(limit=-4)}"
    print(json.dumps(results))


if __name__ == "__main__":
    main()
