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


class City(BaseModel):
    city: str = Field(max_length=8)


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


FUNCTION: Any = {"type": "function", **TOOL["function"]}
RESPONSE_LIMITS: dict[str, Any] = {"temperature": 0, "max_output_tokens": 600}


def responses_text() -> Any:
    """An answer, whole and in a stream."""
    client, limits = openai_client(), {"temperature": 0, "max_output_tokens": 8}
    whole = client.responses.create(model=NAME, instructions="You are brief.", input=QUESTION, **limits)
    with client.responses.stream(model=NAME, instructions="You are brief.", input=QUESTION, **limits) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    return {"same": whole.output_text == deltas != "", "tokens": whole.usage.output_tokens}


def responses_parse() -> Any:
    made = openai_client().responses.parse(model=NAME, input=QUESTION, text_format=Person, **RESPONSE_LIMITS)
    return made.output_parsed.model_dump()


def responses_tools() -> Any:
    """A required call, its result sent back, and an answer after it."""
    client, given = openai_client(), [{"role": "user", "content": QUESTION}]
    required: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False, **RESPONSE_LIMITS}
    response = client.responses.create(model=NAME, input=given, tools=[FUNCTION], **required)
    (call,) = response.output
    result = {
        "type": "function_call_output",
        "call_id": call.call_id,
        "output": weather(**json.loads(call.arguments)),
    }
    given += [*response.output, result]
    final = client.responses.create(model=NAME, input=given, tools=[FUNCTION], temperature=0, max_output_tokens=4)
    return {"name": call.name, "status": final.status}


def ollama_client() -> Any:
    import ollama

    return ollama.Client(host=URL, timeout=300)


OLLAMA_LIMITS: Any = {"temperature": 0, "num_predict": 600}


def ollama_streamed() -> Any:
    """Text of /api/chat and of /api/generate, whole and in a stream."""
    client = ollama_client()
    given: Any = {"model": f"{NAME}:latest", "options": OLLAMA_LIMITS}
    whole = client.chat(messages=MESSAGES, **given)
    deltas = [chunk.message.content for chunk in client.chat(messages=MESSAGES, stream=True, **given)]
    made = client.generate(prompt=QUESTION, system="You are brief.", **given)
    lines = [
        chunk.response for chunk in client.generate(prompt=QUESTION, system="You are brief.", stream=True, **given)
    ]
    texts = {whole.message.content, "".join(deltas), made.response, "".join(lines)}
    return {"same": len(texts) == 1 and texts != {""}, "tokens": whole.eval_count, "done": made.done_reason}


def ollama_structured() -> Any:
    made = ollama_client().chat(model=NAME, messages=MESSAGES, format=Person.model_json_schema(), options=OLLAMA_LIMITS)
    return Person.model_validate_json(made.message.content).model_dump()


def ollama_tools() -> Any:
    """Calls that the model writes, their results sent back, and an answer after them."""
    client, options = ollama_client(), {"temperature": 0, "num_predict": 100}
    question = {"role": "user", "content": QUESTION}
    made = client.chat(model=NAME, messages=[question], tools=[weather], options=options)
    calls = made.message.tool_calls
    results = [
        {"role": "tool", "tool_name": call.function.name, "content": weather(**call.function.arguments)}
        for call in calls
    ]
    final = client.chat(model=NAME, messages=[question, made.message, *results], tools=[weather], options=options)
    streamed = client.chat(model=NAME, messages=[question], tools=[weather], options=options, stream=True)
    same = [call for chunk in streamed for call in chunk.message.tool_calls or ()] == list(calls)
    return {
        "calls": [[call.function.name, call.function.arguments] for call in calls],
        "same": same,
        "more": final.prompt_eval_count > made.prompt_eval_count,
    }


def ollama_embeddings() -> Any:
    made = ollama_client().embed(model=NAME, input=[QUESTION, "1+1="])
    return {"embeddings": [list(vector) for vector in made.embeddings], "tokens": made.prompt_eval_count}


def ollama_models() -> Any:
    import ollama

    client = ollama_client()
    (listed,) = client.list().models
    shown = client.show(listed.model)
    try:
        client.chat(model="other", messages=MESSAGES)
    except ollama.ResponseError as error:
        refused = [error.status_code, error.error]
    return {
        "name": listed.model,
        "size": int(listed.size),
        "digest": listed.digest,
        "family": listed.details.family,
        "capabilities": shown.capabilities,
        "context": shown.modelinfo["qwen2.context_length"],
        "refused": refused,
    }


def instructor_mode(mode: str) -> Any:
    import instructor

    client = instructor.from_openai(openai_client(), mode=instructor.Mode[mode])
    return client.create(model=NAME, messages=MESSAGES, response_model=Person, max_retries=0, **LIMITS).model_dump()


def langchain_chat(**more: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=NAME, base_url=f"{URL}/v1", api_key=KEY, max_retries=0, **LIMITS, **more)


def langchain_structured(method: str, **more: Any) -> Any:
    return langchain_chat(**more).with_structured_output(Person, method=method).invoke(QUESTION).model_dump()


def langchain_tools(**more: Any) -> Any:
    """A call, and an answer to its result."""
    from langchain_core.messages import HumanMessage, ToolMessage

    chat, question = langchain_chat(**more), HumanMessage(QUESTION)
    made = chat.bind_tools([TOOL], tool_choice="weather").invoke([question])
    (call,) = made.tool_calls
    result = ToolMessage(weather(**call["args"]), tool_call_id=call["id"])
    final = chat.bind_tools([TOOL]).invoke([question, made, result])
    return {"name": call["name"], "arguments": sorted(call["args"]), "tokens": final.usage_metadata["output_tokens"]}


def langchain_streamed(**more: Any) -> Any:
    """The text of a stream and of a whole answer."""
    chat = langchain_chat(**more)
    deltas = "".join(chunk.text for chunk in chat.stream(QUESTION))
    return {"same": deltas == chat.invoke(QUESTION).text != ""}


def pydantic_ai(kind: str) -> Any:
    from pydantic_ai import Agent
    from pydantic_ai.models import openai
    from pydantic_ai.providers.openai import OpenAIProvider

    model = getattr(openai, kind)(NAME, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY))
    agent = Agent(model, output_type=Person, model_settings=LIMITS, instructions="You are brief.")
    return asyncio.run(agent.run(QUESTION)).output.model_dump()


def pydantic_ai_streamed() -> Any:
    """The events of /v1/responses in a stream."""
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIResponsesModel(NAME, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY))

    async def texts() -> Any:
        async with Agent(model, model_settings=LIMITS).run_stream(QUESTION) as run:
            deltas = [text async for text in run.stream_text(delta=True, debounce_by=None)]
        whole = await Agent(model, model_settings=LIMITS).run(QUESTION)
        return {"same": "".join(deltas) == whole.output != ""}

    return asyncio.run(texts())


def litellm_client(**more: Any) -> Any:
    import litellm

    given = {"model": f"openai/{NAME}", "base_url": f"{URL}/v1", "api_key": KEY, "max_retries": 0, **LIMITS}
    return litellm.completion(messages=MESSAGES, **given, **more)


def litellm_structured() -> Any:
    return Person.model_validate_json(litellm_client(response_format=Person).choices[0].message.content).model_dump()


def litellm_tools() -> Any:
    made = litellm_client(tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    (call,) = made.choices[0].message.tool_calls
    return {"name": call.function.name, "arguments": sorted(json.loads(call.function.arguments))}


def litellm_streamed() -> Any:
    deltas = "".join(chunk.choices[0].delta.content or "" for chunk in litellm_client(stream=True))
    return {"same": deltas == litellm_client().choices[0].message.content != ""}


def llama_index_chat() -> Any:
    from llama_index.llms.openai_like import OpenAILike

    return OpenAILike(
        model=NAME,
        api_base=f"{URL}/v1",
        api_key=KEY,
        max_retries=0,
        is_chat_model=True,
        is_function_calling_model=True,
        **LIMITS,
    )


def llama_index_structured() -> Any:
    """By a tool call; its way by response_format imports a private name that openai 3 does not have."""
    return llama_index_chat().as_structured_llm(Person).complete(QUESTION).raw.model_dump()


def llama_index_tools() -> Any:
    from llama_index.core.tools import FunctionTool

    chat, tool = llama_index_chat(), FunctionTool.from_defaults(weather, fn_schema=City)
    made = chat.chat_with_tools([tool], user_msg=QUESTION, tool_required=True, allow_parallel_tool_calls=False)
    (call,) = chat.get_tool_calls_from_response(made)
    return {"name": call.tool_name, "arguments": sorted(call.tool_kwargs)}


def llama_index_streamed() -> Any:
    deltas = "".join(chunk.delta or "" for chunk in llama_index_chat().stream_complete(QUESTION))
    return {"same": deltas == llama_index_chat().complete(QUESTION).text != ""}


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
    "pydantic_ai": lambda: pydantic_ai("OpenAIChatModel"),
    "llm": llm_schema,
    "litellm": litellm_structured,
    "litellm.tools": litellm_tools,
    "litellm.stream": litellm_streamed,
    "llama_index": llama_index_structured,
    "llama_index.tools": llama_index_tools,
    "llama_index.stream": llama_index_streamed,
    "ollama": ollama_structured,
    "ollama.stream": ollama_streamed,
    "ollama.models": ollama_models,
    "ollama.tools": ollama_tools,
    "ollama.embed": ollama_embeddings,
    "responses": responses_text,
    "responses.parse": responses_parse,
    "responses.tools": responses_tools,
    "responses.langchain": lambda: langchain_structured("json_schema", use_responses_api=True),
    "responses.langchain.tools": lambda: langchain_tools(use_responses_api=True),
    "responses.langchain.stream": lambda: langchain_streamed(use_responses_api=True),
    "responses.pydantic_ai": lambda: pydantic_ai("OpenAIResponsesModel"),
    "responses.pydantic_ai.stream": pydantic_ai_streamed,
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
