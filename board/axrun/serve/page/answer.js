// One answer of the server: the request, its stream of events, and what they add to a message.

/** Posts a request for a streamed answer. Throws an Error with `status` and `code` if the server refuses. */
export async function post(body, key, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const stream = { stream: true, stream_options: { include_usage: true } };
  const whole = JSON.stringify({ ...body, ...stream });
  const response = await fetch("/v1/chat/completions", { method: "POST", headers, body: whole, signal });
  if (response.ok) return response;
  const refused = (await response.json().catch(() => null))?.error;
  const error = new Error(refused?.message ?? `the server returned status ${response.status}`);
  throw Object.assign(error, { status: response.status, code: refused?.code });
}

/** The JSON of each server-sent event, until [DONE]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection was lost before the answer was complete");
    const parts = (buffer + value).split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** Adds a delta of a stream to a message; returns whether it had text, thoughts or a part of a call. */
export function grow(message, delta) {
  const { content, reasoning_content: thoughts, tool_calls: calls } = delta ?? {};
  if (content) message.content += content;
  if (thoughts) message.reasoning = (message.reasoning ?? "") + thoughts;
  for (const { index, id, function: given } of calls ?? []) {
    message.calls ??= [];
    const call = (message.calls[index ?? message.calls.length] ??= { id: "", name: "", arguments: "" });
    if (id) call.id = id;
    call.name += given?.name ?? "";
    call.arguments += given?.arguments ?? "";
  }
  return Boolean(content || thoughts || calls?.length);
}

/** When an answer came, in milliseconds. */
export class Clock {
  constructor() {
    Object.assign(this, { start: performance.now(), first: 0, last: 0, thought: undefined, pieces: 0 });
  }

  /** A piece of the answer has come. */
  tick({ content, reasoning }) {
    this.last = performance.now();
    this.first ||= this.last;
    this.pieces += 1;
    if (reasoning && !content) this.thought = this.last - this.first;
  }

  /** The speed so far, in tokens a second; a piece is about a token while the answer is in progress. */
  speed(tokens = this.pieces) {
    const seconds = (this.last - this.first) / 1000;
    return tokens > 1 && seconds > 0 ? `${((tokens - 1) / seconds).toFixed(1)} tok/s` : "";
  }

  /** A line about a complete answer. */
  figures(usage, finish, context) {
    const tokens = usage?.completion_tokens ?? this.pieces;
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    const ends = {
      length: usage?.total_tokens >= context ? "cut: the context is full" : "cut at the length limit",
      stopped: "stopped",
    };
    const parts = [
      this.first && `first token ${Math.round(this.first - this.start)} ms`,
      this.speed(tokens),
      usage && `${usage.prompt_tokens} tokens read${cached ? ` (${cached} of them reused)` : ""}`,
      tokens && `${tokens} written`,
      ends[finish],
    ];
    return parts.filter(Boolean).join(" · ");
  }
}
