"use strict";

const $ = (id) => document.getElementById(id);
const SETTINGS = ["system", "temperature", "top_p", "max_tokens", "seed"];
const NUMBERS = SETTINGS.slice(1);

let model = "";
let messages = load(localStorage, "axrun.messages", []); // {role, content, figures, error}
let answering = null; // the AbortController of the answer that is being written

function load(storage, key, otherwise) {
  try {
    return JSON.parse(storage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function save(storage, key, value) {
  try {
    storage.setItem(key, JSON.stringify(value));
  } catch {
    // a full or forbidden storage forgets the conversation, and nothing else
  }
}

// ---- what is shown

function element(kind, className, text) {
  const made = document.createElement(kind);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Text as text, and what stands between ``` as code. Nothing the model says is ever HTML. */
function fill(target, text) {
  target.replaceChildren(
    ...text.split(/^```[^\n]*\n?/m).map((part, index) =>
      index % 2 ? element("pre", "", part.replace(/\n$/, "")) : document.createTextNode(part),
    ),
  );
}

function button(text, act) {
  const made = element("button", "", text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

function show(message, index) {
  const turn = element("article", `turn ${message.role}`);
  turn.setAttribute("aria-label", message.role === "user" ? "You" : "Answer");
  const text = element("div", "text");
  fill(text, message.content);
  turn.append(text);
  if (message.error) turn.append(element("div", "error", message.error));
  if (message.role === "assistant" && message.figures !== undefined) {
    const below = element("div", "below");
    if (message.figures) below.append(element("span", "figures", message.figures));
    if (message.content) below.append(button("Copy", () => navigator.clipboard?.writeText(message.content)));
    if (index === messages.length - 1) below.append(button("Try again", again), button("Edit question", edit));
    turn.append(below);
  }
  return turn;
}

function showAll() {
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  $("log").append(...messages.map(show));
  $("empty").hidden = messages.length > 0;
  $("log").scrollTop = $("log").scrollHeight;
}

function showState() {
  const busy = answering !== null;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("send").disabled = !$("prompt").value.trim();
}

function fit() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

// ---- what is asked

function request() {
  const body = { model, stream: true, stream_options: { include_usage: true } };
  const system = $("system").value.trim();
  const spoken = messages.filter((message) => message.content).map(({ role, content }) => ({ role, content }));
  body.messages = system ? [{ role: "system", content: system }, ...spoken] : spoken;
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  return { method: "POST", headers, body: JSON.stringify(body) };
}

/** The JSON of each server-sent event, until [DONE]. */
async function* events(response) {
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

async function reason(response) {
  const body = await response.json().catch(() => null);
  if (response.status === 401) toggleSettings(true);
  return body?.error?.message ?? `the server answered ${response.status}`;
}

function figures(clock, usage, finish) {
  const parts = [];
  if (clock.first) parts.push(`first token ${Math.round(clock.first - clock.start)} ms`);
  const tokens = usage?.completion_tokens ?? clock.tokens;
  const seconds = (clock.last - clock.first) / 1000;
  if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tok/s`);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    parts.push(`${usage.prompt_tokens} tokens read${cached ? ` (${cached} of them reused)` : ""}`);
  }
  if (tokens) parts.push(`${tokens} written`);
  if (finish === "length") parts.push("cut at the length limit");
  if (finish === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

async function answer() {
  const message = { role: "assistant", content: "" };
  const clock = { start: performance.now(), first: 0, last: 0, tokens: 0 };
  const given = request();
  let usage, finish;
  answering = new AbortController();
  messages.push(message);
  const turn = show(message, messages.length - 1);
  const text = turn.querySelector(".text");
  turn.classList.add("writing");
  $("log").append(turn);
  $("log").scrollTop = $("log").scrollHeight;
  showState();
  try {
    const response = await fetch("/v1/chat/completions", { ...given, signal: answering.signal });
    if (!response.ok) throw new Error(await reason(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      finish = choice?.finish_reason ?? finish;
      if (!choice?.delta.content) continue;
      clock.last = performance.now();
      clock.first ||= clock.last;
      clock.tokens += 1;
      const log = $("log");
      const below = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      message.content += choice.delta.content;
      fill(text, message.content);
      if (below) log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    if (answering.signal.aborted) finish = "stopped";
    else message.error = error instanceof TypeError ? "The server cannot be reached." : error.message;
  }
  message.figures = figures(clock, usage, finish);
  answering = null;
  save(localStorage, "axrun.messages", messages);
  showAll();
  showState();
  $("prompt").focus();
}

function ask() {
  const content = $("prompt").value.trim();
  if (!content || answering) return;
  $("prompt").value = "";
  fit();
  messages.push({ role: "user", content });
  save(localStorage, "axrun.messages", messages);
  showAll();
  answer();
}

function again() {
  if (answering) return;
  messages.pop();
  showAll();
  answer();
}

/** Takes the last question back into the field; its answer goes. */
function edit() {
  if (answering) return;
  messages.pop();
  const question = messages.pop();
  if (question) $("prompt").value = question.content;
  save(localStorage, "axrun.messages", messages);
  showAll();
  fit();
  showState();
  $("prompt").focus();
}

function stop() {
  answering?.abort();
}

function forget() {
  stop();
  messages = [];
  save(localStorage, "axrun.messages", messages);
  showAll();
  $("prompt").focus();
}

function toggleSettings(open) {
  $("settings").hidden = !open;
  $("settings-button").setAttribute("aria-expanded", String(open));
}

async function greet() {
  const health = $("health");
  try {
    const response = await fetch("/health");
    const state = await response.json();
    model = state.model;
    health.className = response.ok ? "ok" : "";
    health.title = state.status === "ok" ? `ready: ${state.busy} of ${state.slots} slots busy` : state.status;
    $("model").textContent = $("greeted").textContent = model;
    document.title = `${model} · axrun`;
  } catch {
    health.className = "bad";
    health.title = "the server cannot be reached";
  }
  setTimeout(greet, health.className === "ok" ? 10000 : 1000);
}

// ---- hands and keys

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
$("prompt").addEventListener("input", () => {
  fit();
  showState();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", forget);
$("settings-button").addEventListener("click", () => toggleSettings($("settings").hidden));

const kept = load(localStorage, "axrun.settings", {});
for (const name of SETTINGS) $(name).value = kept[name] ?? "";
$("key").value = load(sessionStorage, "axrun.key", "");
$("settings").addEventListener("input", () => {
  save(localStorage, "axrun.settings", Object.fromEntries(SETTINGS.map((name) => [name, $(name).value])));
  save(sessionStorage, "axrun.key", $("key").value);
});
for (const message of messages) if (message.role === "assistant") message.figures ??= "interrupted";
addEventListener("pagehide", () => save(localStorage, "axrun.messages", messages));
showAll();
showState();
greet();
