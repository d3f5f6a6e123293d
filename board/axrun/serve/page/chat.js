// The page: which conversation is shown, the answer in progress, and what the user does.

import { Clock, events, grow, post } from "./answer.js";
import { Chats } from "./chats.js";
import { element } from "./code.js";
import { estimate, leaveOut, makeRoom, rateOf, toSend, turnsBefore } from "./context.js";
import { add, choose, pathOf, shownOf, startOf, versions } from "./conversation.js";
import { listen } from "./keys.js";
import { load as loadMarkdown } from "./markdown.js";
import { context, forget, pick, served, several, watch } from "./models.js";
import { paced } from "./pace.js";
import { narrow, togglePanel, turnPanel } from "./panels.js";
import * as settings from "./settings.js";
import { load, Store } from "./store.js";
import { belowOf, Drawing, editorIn, resultsForm, turnOf } from "./turn.js";

const $ = (id) => document.getElementById(id);
const SAVE_MS = 1000; // while an answer is being generated
const QUIET_MS = 10000; // after which an answer of another tab counts as interrupted

let answering = null; // the answer in progress: {at, abort, settle}
let leaving = false; // the page is being unloaded, so pending requests fail
let elsewhere = 0; // the timer of an answer in progress in another tab
const store = new Store(() => answering !== null, adopt, () => chats.draw());
const chats = new Chats(store, { open: openChat, removed, renamed });
let conversation = store.open();

// ---- rendering

function show(at) {
  const message = conversation.messages[at];
  const turn = turnOf(message);
  turn.dataset.at = at;
  if (at === answering?.at) return turn;
  const state = !message.writing ? message.figures : elsewhere ? "being written in another tab" : "interrupted";
  const told = [message.model, state].filter(Boolean).join(" · ");
  const buttons = { Edit: () => edit(at) };
  if (message.role === "assistant") buttons["Try again"] = () => again(at);
  if (elsewhere) for (const name of Object.keys(buttons)) delete buttons[name];
  const acts = { choose: (other, name) => switchTo(other, name), buttons };
  turn.append(belowOf(turn, message, at, versions(conversation, at), told, acts));
  if (at === conversation.leaf && message.calls?.length && !message.writing)
    turn.append(resultsForm(message.calls, (results) => sendResults(at, results)));
  return turn;
}

function showAll(scroll = true) {
  for (const turn of document.querySelectorAll(".turn, .note")) turn.remove();
  const path = pathOf(conversation);
  const turns = path.map(show);
  const start = startOf(shownOf(conversation));
  for (const turn of turns.slice(0, start)) turn.classList.add("left-out");
  if (start > 0 && start < turns.length) turns.splice(start, 0, element("p", "note", leftOut(start)));
  $("log").append(...turns);
  $("empty").hidden = path.length > 0;
  if (scroll) $("log").scrollTop = $("log").scrollHeight;
  showGauge(conversation.messages[conversation.leaf]?.tokens);
}

function leftOut(start) {
  const count = turnsBefore(shownOf(conversation), start);
  const what = count === 1 ? "The turn above is" : `The ${count} turns above are`;
  return `${what} left out: the model's context of ${context.toLocaleString("en")} tokens is full.`;
}

const turnAt = (at) => document.querySelector(`.turn[data-at="${at}"]`);

/** The messages to send. */
function prompt() {
  const shown = shownOf(conversation);
  return toSend(shown, startOf(shown), settings.system());
}

/** Shows the use of the context; `tokens` as counted by the server, else estimated. */
function showGauge(tokens, speed = "") {
  // The last token of an answer is counted, but is not in the KV cache yet.
  const used = Math.min(tokens ?? estimate(prompt(), conversation.rate), context);
  $("gauge").hidden = !context || conversation.leaf < 0;
  $("gauge-bar").max = context;
  $("gauge-bar").high = context * 0.75;
  $("gauge-bar").value = used;
  const about = tokens === undefined ? "about " : "";
  $("gauge-text").textContent = `${about}${used.toLocaleString("en")} of ${context.toLocaleString("en")} tokens`;
  $("speed").textContent = speed;
}

function showState() {
  const busy = answering !== null;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("send").disabled = !$("prompt").value.trim();
}

function fit() {
  const field = $("prompt");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function keep() {
  $("unkept").hidden = store.save(conversation);
}

/** Another tab has changed the conversation. */
function adopt(changed) {
  conversation = changed;
  clearTimeout(elsewhere);
  elsewhere = 0;
  if (changed.messages[changed.leaf]?.writing)
    elsewhere = setTimeout(() => {
      elsewhere = 0;
      showAll();
    }, QUIET_MS);
  showAll();
}

// ---- answers

/** A different seed for every try: random, or counting up from the seed in the settings. */
function seedOf(tries) {
  const first = settings.seed();
  return first === null ? crypto.getRandomValues(new Uint32Array(1))[0] : first + tries;
}

/** Sends the conversation; if the server finds it too long, again with more of the oldest turns left out. */
async function respond(message, signal) {
  for (;;) {
    const body = { ...settings.fields(), model: served || undefined, seed: message.seed, messages: prompt() };
    try {
      return await post(body, settings.key(), signal);
    } catch (error) {
      if (error.status === 401) togglePanel("settings", true);
      if (error.code !== "context_length_exceeded") throw error;
      const shown = shownOf(conversation);
      const start = leaveOut(shown, startOf(shown));
      if (start === startOf(shown)) throw error;
      message.start = start;
    }
  }
}

/** Generates an answer to a message; `before` is the previous answer to it. */
async function answer(parent, before) {
  const tries = before ? (before.tries ?? 0) + 1 : 0;
  const begun = { role: "assistant", content: "", seed: seedOf(tries), tries, writing: true };
  if (several()) begun.model = served;
  const at = add(conversation, begun, parent);
  const message = conversation.messages[at];
  const shown = shownOf(conversation);
  const start = makeRoom(shown, startOf(shown), conversation.rate, settings.system(), context);
  if (start > startOf(shown)) message.start = start;
  const abort = new AbortController();
  const clock = new Clock();
  let [saved, usage, finish, settled] = [clock.start, null, "", false];
  answering = { at };
  keep();
  showAll();
  showState();
  chats.draw();
  const turn = turnAt(at);
  turn.classList.add("writing");
  turn.setAttribute("aria-busy", "true");
  const drawing = new Drawing(turn, message);
  const pace = paced($("log"), () => drawing.draw());
  const settle = (ending) => {
    if (settled) return;
    settled = true;
    pace.cancel();
    answering = null;
    drawing.finish();
    if (message.error && !message.content) delete message.start; // leaving turns out did not help
    complete(message, before, clock, usage, ending);
    showState();
  };
  Object.assign(answering, { abort, settle });
  try {
    for await (const event of events(await respond(message, abort.signal))) {
      if (settled) return;
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      finish = event.choices[0]?.finish_reason ?? finish;
      if (!grow(message, event.choices[0]?.delta)) continue;
      clock.tick(message);
      if (clock.thought !== undefined) message.thought = Math.round(clock.thought);
      pace.later();
      if (clock.last - saved < SAVE_MS) continue;
      saved = clock.last;
      keep();
      showGauge(undefined, clock.speed());
    }
  } catch (error) {
    if (settled) return;
    if (leaving) return keep();
    if (abort.signal.aborted) finish = "stopped";
    else message.error = error instanceof TypeError ? "The server cannot be reached." : error.message;
  }
  settle(finish);
  $("prompt").focus();
}

/** Completes an answer of the conversation that is shown. */
function complete(message, before, clock, usage, ending) {
  const told = clock.figures(usage, ending, context);
  const same = before?.content && before.content === message.content;
  delete message.writing;
  message.figures = same ? `${told} · same answer as before: set a temperature above 0 for other answers` : told;
  if (usage) {
    message.tokens = usage.total_tokens;
    conversation.rate = rateOf(prompt(), usage.total_tokens) ?? conversation.rate;
  }
  keep();
  showAll();
  chats.draw();
}

function stop() {
  answering?.abort.abort();
}

/** Ends the answer in progress before another conversation is shown. */
function leave() {
  if (!answering) return;
  const { abort, settle } = answering;
  abort.abort();
  settle("stopped");
}

// ---- what the user does with a conversation

function ask() {
  const content = $("prompt").value.trim();
  if (!content || answering) return;
  $("prompt").value = "";
  fit();
  answer(add(conversation, { role: "user", content }));
}

function again(at) {
  if (answering || elsewhere) return;
  const before = conversation.messages[at];
  answer(before.parent, before);
}

function sendResults(at, results) {
  if (answering) return;
  const { calls } = conversation.messages[at];
  conversation.leaf = at;
  calls.forEach(({ id, name }, index) => add(conversation, { role: "tool", content: results[index], call: id, name }));
  answer(conversation.leaf);
}

/** Edits a message in place. A changed one becomes a new version; what is not an answer is answered again. */
function edit(at) {
  if (answering || elsewhere) return;
  const { role, content, parent, call, name } = conversation.messages[at];
  const cancel = () => {
    showAll(false);
    press(at, "Edit");
  };
  const change = (text) => {
    if (answering) return;
    if (!text.trim() || (text === content && role === "assistant")) return cancel();
    if (role === "assistant") {
      const { reasoning, calls } = conversation.messages[at];
      add(conversation, { role, content: text, reasoning, calls, figures: "edited" }, parent);
      keep();
      showAll(false);
      chats.draw();
      $("prompt").focus();
    } else if (role === "tool") answer(copyResults(at, { role, content: text, call, name }));
    else answer(add(conversation, { role, content: text.trim() }, parent));
  };
  editorIn(turnAt(at), content, role === "assistant" ? "Save" : "Send", { save: change, cancel });
}

/** Adds a changed result, and copies of the results of other calls after it; returns the index of the last. */
function copyResults(at, changed) {
  const { messages } = conversation;
  const path = pathOf(conversation);
  let end = add(conversation, changed, messages[at].parent);
  for (let index = path.indexOf(at) + 1; messages[path[index]]?.role === "tool"; index += 1) {
    const { role, content, call, name } = messages[path[index]];
    end = add(conversation, { role, content, call, name }, end);
  }
  return end;
}

/** Focuses a button of a turn, which was drawn again. */
function press(at, label) {
  const buttons = [...(turnAt(at)?.querySelectorAll(".below button") ?? [])];
  const same = buttons.find((one) => (one.getAttribute("aria-label") ?? one.textContent) === label && !one.disabled);
  (same ?? buttons.find((one) => !one.disabled))?.focus();
}

function switchTo(at, name) {
  if (answering || elsewhere) return;
  choose(conversation, at);
  keep();
  showAll(false);
  press(at, name);
}

/** The last message of a role that is shown. */
const lastOf = (role) => pathOf(conversation).findLast((at) => conversation.messages[at].role === role);

/** Shows the previous or next version of the last message that has several. */
function turnVersion(by) {
  const at = pathOf(conversation).findLast((each) => versions(conversation, each).length > 1);
  if (at === undefined) return;
  const all = versions(conversation, at);
  const other = all[all.indexOf(at) + by];
  if (other !== undefined) switchTo(other, by < 0 ? "Previous version" : "Next version");
}

// ---- conversations

function openChat(id) {
  if (id !== store.id) {
    leave();
    adopt(store.open(id));
    $("unkept").hidden = true;
  }
  if (narrow()) togglePanel("chats", false);
  chats.draw();
  $("prompt").focus();
}

function newChat() {
  leave();
  adopt(store.create());
  $("unkept").hidden = true;
  if (narrow()) togglePanel("chats", false);
  chats.draw();
  $("prompt").focus();
}

function removed(id) {
  if (id !== store.id) return;
  leave();
  store.remove(store.id); // an answer in progress was saved once more
  adopt(store.create());
}

function renamed(id, title) {
  if (id === store.id) conversation.title = title;
}

// ---- user input

$("as-text").hidden = await loadMarkdown();

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
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
  if (event.key !== "Escape" || $("keys").open) return;
  if (answering) stop();
  else if (!$("settings").hidden) panels.settings();
  else if (!$("chats").hidden && narrow()) panels.chats();
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", newChat);
const panels = {
  chats() {
    turnPanel("chats", "search");
    chats.draw();
  },
  settings: () => turnPanel("settings", "system"),
};
$("chats-button").addEventListener("click", panels.chats);
$("chats-close").addEventListener("click", panels.chats);
$("settings-button").addEventListener("click", panels.settings);

const onLast = (role, act) => () => {
  const at = lastOf(role);
  if (at !== undefined) act(at);
};
listen({
  KeyN: newChat,
  KeyC: panels.chats,
  KeyS: panels.settings,
  KeyI: () => $("prompt").focus(),
  KeyE: onLast("user", edit),
  KeyR: onLast("assistant", again),
  Comma: () => turnVersion(-1),
  Period: () => turnVersion(1),
});
settings.open((name) => {
  if (name === "theme") applyTheme(settings.theme()); // of theme.js
  if (name === "model") pick();
  if (name === "key") forget(); // list the models with this key
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
togglePanel("chats", !narrow() && load("localStorage", "axrun.panel", true));
chats.draw();
showAll();
showState();
watch(() => {
  if (!answering) showGauge(conversation.messages[conversation.leaf]?.tokens);
});
