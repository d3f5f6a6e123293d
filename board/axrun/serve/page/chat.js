import { button, copy, element } from "/code.js";
import { estimate, leaveOut, makeRoom, rateOf, shown } from "/context.js";
import { load as loadMarkdown, plain, Writing } from "/markdown.js";
import { empty, load, save, Store } from "/store.js";

const $ = (id) => document.getElementById(id);
const SETTINGS = ["system", "temperature", "top_p", "max_tokens", "seed"];
const NUMBERS = SETTINGS.slice(1, 4);
const SAVE_MS = 1000; // while an answer is being generated
const QUIET_MS = 10000; // after which an answer of another tab counts as interrupted
const RENDER_SHARE = 4; // spend at most 1/RENDER_SHARE of the time rendering an answer

let model = "";
let context = 0; // tokens; 0: not known yet
let answering = null; // the AbortController of the answer in progress
let leaving = false; // the page is being unloaded, so pending requests fail
let elsewhere = 0; // the timer of an answer in progress in another tab
const store = new Store(() => answering !== null, adopt);
let conversation = store.open(); // messages: {role, content, figures, error, seed, tries, tokens, writing}
const drawn = new WeakMap(); // the rendered text of a message: {content, text}

// ---- rendering

function textOf(message) {
  const known = drawn.get(message);
  if (known?.content === message.content) return known.text;
  const text = element("div", "text");
  if (message.role === "user") text.append(...plain(message.content));
  else new Writing(text).finish(message.content);
  drawn.set(message, { content: message.content, text });
  return text;
}

function show(message, index) {
  const { messages, start } = conversation;
  const turn = element("article", `turn ${message.role}`);
  turn.setAttribute("aria-label", message.role === "user" ? "You" : "Answer");
  turn.classList.toggle("left-out", index < start);
  const text = textOf(message);
  turn.append(text);
  if (message.error) turn.append(element("div", "error", message.error));
  if (message.role === "assistant" && message !== answering?.message) {
    const below = element("div", "below");
    const told = !message.writing ? message.figures : elsewhere ? "being written in another tab" : "interrupted";
    if (told) below.append(element("span", "figures", told));
    if (message.content) below.append(button("Copy", (pressed) => copy(pressed, message.content, text)));
    if (index === messages.length - 1 && !elsewhere)
      below.append(button("Try again", again), button("Edit question", edit));
    turn.append(below);
  }
  return turn;
}

function showAll() {
  for (const turn of document.querySelectorAll(".turn, .note")) turn.remove();
  const { messages, start } = conversation;
  const turns = messages.map(show);
  if (start > 0 && start < messages.length) turns.splice(start, 0, element("p", "note", leftOut(start)));
  $("log").append(...turns);
  $("empty").hidden = messages.length > 0;
  $("log").scrollTop = $("log").scrollHeight;
  showGauge(messages.at(-1)?.tokens);
}

function leftOut(start) {
  const count = start / 2;
  const what = count === 1 ? "The turn above is" : `The ${count} turns above are`;
  return `${what} left out: the model's context of ${context.toLocaleString("en")} tokens is full.`;
}

/** Shows the use of the context; `tokens` as counted by the server, else estimated. */
function showGauge(tokens) {
  // The last token of an answer is counted, but is not in the KV cache yet.
  const used = Math.min(tokens ?? estimate(shown(conversation, system()), conversation.rate), context);
  $("gauge").hidden = !context || !conversation.messages.length;
  $("gauge-bar").max = context;
  $("gauge-bar").high = context * 0.75;
  $("gauge-bar").value = used;
  const about = tokens === undefined ? "about " : "";
  $("gauge-text").textContent = `${about}${used.toLocaleString("en")} of ${context.toLocaleString("en")} tokens`;
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

function keep() {
  $("unkept").hidden = store.save(conversation);
}

/** Another tab has changed the conversation. */
function adopt(changed) {
  conversation = changed;
  clearTimeout(elsewhere);
  elsewhere = 0;
  if (changed.messages.at(-1)?.writing)
    elsewhere = setTimeout(() => {
      elsewhere = 0;
      showAll();
    }, QUIET_MS);
  showAll();
}

// ---- requests

const system = () => $("system").value.trim();

function request(seed) {
  const body = { model, seed, stream: true, stream_options: { include_usage: true } };
  body.messages = shown(conversation, system());
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  return { method: "POST", headers, body: JSON.stringify(body), signal: answering.signal };
}

/** A different seed for every try: random, or counting up from the seed in the settings. */
function seedOf(tries) {
  if ($("seed").value !== "") return Number($("seed").value) + tries;
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

/** Sends the conversation; if the server finds it too long, again with more of the oldest turns left out. */
async function respond(seed) {
  for (;;) {
    const response = await fetch("/v1/chat/completions", request(seed));
    if (response.ok) return response;
    const body = await response.json().catch(() => null);
    if (body?.error?.code === "context_length_exceeded" && leaveOut(conversation)) continue;
    if (response.status === 401) toggleSettings(true);
    throw new Error(body?.error?.message ?? `the server returned status ${response.status}`);
  }
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
  if (finish === "length")
    parts.push(usage?.total_tokens >= context ? "cut: the context is full" : "cut at the length limit");
  if (finish === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

/** Renders an answer in progress: at most once a frame, and within RENDER_SHARE of the time. */
function drawing(text) {
  const writing = new Writing(text);
  let message = null;
  let due = 0;
  const draw = () => {
    if (message === null) return;
    const log = $("log");
    const below = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    const began = performance.now();
    writing.draw(message.content);
    if (below) log.scrollTop = log.scrollHeight;
    const now = performance.now();
    due = now + (RENDER_SHARE - 1) * (now - began);
    message = null;
  };
  return {
    later(changed) {
      if (message === null) setTimeout(() => requestAnimationFrame(draw), due - performance.now());
      message = changed;
    },
    finish(changed) {
      message = null;
      writing.finish(changed.content);
      drawn.set(changed, { content: changed.content, text });
    },
  };
}

/** Generates an answer to the last question; `before` is the rejected previous answer. */
async function answer(before) {
  const tries = before ? (before.tries ?? 0) + 1 : 0;
  const message = { role: "assistant", content: "", seed: seedOf(tries), tries, writing: true };
  const clock = { start: performance.now(), first: 0, last: 0, tokens: 0, saved: performance.now() };
  const mine = conversation;
  const { start } = mine;
  let usage, finish;
  answering = Object.assign(new AbortController(), { message });
  mine.messages.push(message);
  makeRoom(mine, system(), context);
  keep();
  showAll();
  showState();
  const turn = $("log").lastElementChild;
  turn.classList.add("writing");
  turn.setAttribute("aria-busy", "true");
  $("log").scrollTop = $("log").scrollHeight;
  const draw = drawing(turn.querySelector(".text"));
  try {
    for await (const event of events(await respond(message.seed))) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      finish = choice?.finish_reason ?? finish;
      if (!choice?.delta.content) continue;
      clock.last = performance.now();
      clock.first ||= clock.last;
      clock.tokens += 1;
      message.content += choice.delta.content;
      draw.later(message);
      if (clock.last - clock.saved < SAVE_MS) continue;
      clock.saved = clock.last;
      keep();
      showGauge();
    }
  } catch (error) {
    if (leaving) return keep();
    if (answering.signal.aborted) finish = "stopped";
    else message.error = error instanceof TypeError ? "The server cannot be reached." : error.message;
  }
  if (message.error && !message.content) mine.start = start; // leaving turns out did not help
  answering = null;
  draw.finish(message);
  if (mine === conversation) complete(message, before, figures(clock, usage, finish), usage);
  showState();
  $("prompt").focus();
}

/** Finishes an answer. */
function complete(message, before, told, usage) {
  const same = before?.content && before.content === message.content;
  delete message.writing;
  message.figures = same ? `${told} · same answer as before: set a temperature above 0 for other answers` : told;
  message.tokens = usage?.total_tokens;
  if (usage) conversation.rate = rateOf(shown(conversation, system()), usage.total_tokens) ?? conversation.rate;
  keep();
  showAll();
}

function ask() {
  const content = $("prompt").value.trim();
  if (!content || answering) return;
  $("prompt").value = "";
  fit();
  conversation.messages.push({ role: "user", content });
  answer();
}

function again() {
  if (answering) return;
  answer(conversation.messages.pop());
}

/** Moves the last question back into the input field and removes its answer. */
function edit() {
  if (answering) return;
  const [question] = conversation.messages.splice(-2);
  conversation.start = Math.min(conversation.start, conversation.messages.length);
  $("prompt").value = question.content;
  keep();
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
  conversation = empty();
  store.forget();
  $("unkept").hidden = true;
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
    ({ model, context_length: context } = state);
    health.className = response.ok ? "ok" : "";
    health.title = state.status === "ok" ? `ready: ${state.busy} of ${state.slots} slots busy` : state.status;
    $("model").textContent = $("greeted").textContent = model;
    document.title = `${model} · axrun`;
    if (!answering) showGauge(conversation.messages.at(-1)?.tokens);
  } catch {
    health.className = "bad";
    health.title = "the server cannot be reached";
  }
  setTimeout(greet, health.className === "ok" ? 10000 : 1000);
}

// ---- user input

$("as-text").hidden = await loadMarkdown();

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

const kept = load("localStorage", "axrun.settings", {});
for (const name of SETTINGS) $(name).value = kept[name] ?? "";
$("key").value = load("sessionStorage", "axrun.key", "");
$("settings").addEventListener("input", () => {
  save("localStorage", "axrun.settings", Object.fromEntries(SETTINGS.map((name) => [name, $(name).value])));
  save("sessionStorage", "axrun.key", $("key").value);
});
addEventListener("beforeunload", () => {
  leaving = true;
  setTimeout(() => (leaving = false), 3000); // the unload was cancelled
});
addEventListener("pagehide", () => {
  leaving = true;
  if (answering) keep();
});
addEventListener("pageshow", () => (leaving = false));
showAll();
showState();
greet();
