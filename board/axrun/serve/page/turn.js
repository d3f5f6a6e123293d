// One turn as DOM nodes. Everything in a message is untrusted: an answer's text goes through markdown.js, and all else is
// set as text.

import { button, copy, element } from "./code.js";
import { plain, Writing } from "./markdown.js";

const drawn = new WeakMap(); // the rendered text of a message: {content, text}
const unfolded = new WeakMap(); // names of the sections of a message that the user has opened

/** The text of a message; the same node as long as the text is the same. */
function textOf(message) {
  const known = drawn.get(message);
  if (known?.content === message.content) return known.text;
  const text = element("div", "text");
  if (message.role === "assistant") new Writing(text).finish(message.content);
  else text.append(...plain(message.content));
  drawn.set(message, { content: message.content, text });
  return text;
}

/** A collapsed section that stays open or closed when the turn is drawn again. */
function section(message, name, className, title, content) {
  const made = element("details", className);
  const opened = unfolded.get(message) ?? unfolded.set(message, new Set()).get(message);
  made.open = opened.has(name);
  made.addEventListener("toggle", () => (made.open ? opened.add(name) : opened.delete(name)));
  made.append(element("summary", "", title), content);
  return made;
}

function thoughtsTitle({ content, writing, calls, thought }) {
  if (writing && !content && !calls) return "Thinking…";
  return thought === undefined ? "Thoughts" : `Thoughts, ${(thought / 1000).toFixed(1)} s`;
}

function thoughtsOf(message) {
  const text = element("div", "thoughts-text", message.reasoning);
  return section(message, "thoughts", "thoughts", thoughtsTitle(message), text);
}

/** The arguments of a call, indented if they are JSON. */
function readable(given) {
  try {
    return JSON.stringify(JSON.parse(given), null, 2);
  } catch {
    return given;
  }
}

function block(text, label) {
  const pre = element("pre", "", text);
  pre.tabIndex = 0; // so that the arrow keys scroll a wide one
  pre.setAttribute("role", "group");
  pre.setAttribute("aria-label", label);
  return pre;
}

function callsOf(message) {
  return (message.calls ?? []).map(({ name, arguments: given }, index) =>
    section(message, `call ${index}`, "call", `Call of ${name}`, block(readable(given), `Arguments of ${name}`)),
  );
}

const LABELS = { user: "You", assistant: "Answer", tool: "Result" };

/** An article without buttons: thoughts, text, calls, error. */
export function turnOf(message) {
  const turn = element("article", `turn ${message.role}`);
  turn.setAttribute("aria-label", LABELS[message.role]);
  if (message.role === "tool") {
    const title = `Result of ${message.name ?? "the call"}`;
    turn.append(section(message, "result", "call", title, block(message.content, title)));
    return turn;
  }
  if (message.reasoning) turn.append(thoughtsOf(message));
  turn.append(textOf(message), ...callsOf(message));
  if (message.error) turn.append(element("div", "error", message.error));
  return turn;
}

/** Draws an answer in progress into its turn. `finish` draws all of it, as a loaded answer is drawn. */
export class Drawing {
  constructor(turn, message) {
    this.turn = turn;
    this.message = message;
    this.text = turn.querySelector(".text");
    this.writing = new Writing(this.text);
  }

  draw() {
    const { turn, message, text } = this;
    if (message.reasoning) {
      if (!turn.querySelector(".thoughts")) text.before(thoughtsOf(message));
      const [summary, thoughts] = turn.querySelector(".thoughts").children;
      summary.textContent = thoughtsTitle(message);
      const shown = thoughts.textContent.length;
      if (shown < message.reasoning.length) thoughts.append(message.reasoning.slice(shown));
    }
    this.writing.draw(message.content);
    if (turn.querySelectorAll(".call").length < (message.calls?.length ?? 0)) {
      for (const old of turn.querySelectorAll(".call")) old.remove();
      text.after(...callsOf(message));
    }
  }

  finish() {
    this.writing.finish(this.message.content);
    drawn.set(this.message, { content: this.message.content, text: this.text });
  }
}

/** The buttons to switch between versions; `choose(index)` shows one. */
function versionSwitch(all, at, choose) {
  const made = element("span", "versions");
  const now = all.indexOf(at);
  made.setAttribute("role", "group");
  made.setAttribute("aria-label", `Version ${now + 1} of ${all.length}`);
  for (const [name, sign, to] of [["Previous version", "‹", now - 1], ["Next version", "›", now + 1]]) {
    const pressed = button(sign, () => choose(all[to], name));
    pressed.setAttribute("aria-label", name);
    pressed.disabled = all[to] === undefined;
    made.append(pressed);
  }
  made.children[0].after(element("span", "", `${now + 1}/${all.length}`));
  return made;
}

/** The line below a turn: versions, buttons, and `told`. `acts` are functions by label. */
export function belowOf(turn, message, at, all, told, acts) {
  const below = element("div", "below");
  if (all.length > 1) below.append(versionSwitch(all, at, acts.choose));
  if (message.content && message.role !== "tool")
    below.append(button("Copy", (pressed) => copy(pressed, message.content, turn.querySelector(".text"))));
  for (const [label, act] of Object.entries(acts.buttons)) below.append(button(label, act));
  if (told) below.append(element("span", "figures", told));
  return below;
}

/** Replaces the content of a turn by an editor of its text, with a button `label`. */
export function editorIn(turn, content, label, { save, cancel }) {
  const editor = element("form", "editor");
  const area = element("textarea");
  area.value = content;
  area.setAttribute("aria-label", `New text of: ${turn.getAttribute("aria-label")}`);
  const submit = button(label, () => save(area.value));
  submit.classList.add("main");
  editor.append(area, submit, button("Cancel", cancel));
  editor.addEventListener("submit", (event) => event.preventDefault());
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  };
  area.addEventListener("input", fit);
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") cancel();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save(area.value);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  turn.replaceChildren(editor);
  fit();
  area.focus();
}

/** A form for the results of the calls of an answer; `send(results)` gets a text for each. */
export function resultsForm(calls, send) {
  const form = element("form", "results");
  calls.forEach(({ name }, index) => {
    const label = element("label", "", `Result of ${name}${calls.length > 1 ? ` (call ${index + 1})` : ""}`);
    label.append(element("textarea"));
    label.lastChild.rows = 2;
    form.append(label);
  });
  const areas = [...form.querySelectorAll("textarea")];
  form.append(button("Send results", () => send(areas.map(({ value }) => value))));
  form.addEventListener("submit", (event) => event.preventDefault());
  return form;
}
