"""OpenAI's Responses API, on top of chat completions: https://platform.openai.com/docs/api-reference/responses"""
