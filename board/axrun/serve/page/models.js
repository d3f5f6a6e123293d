// The models of the server, and its health.

import * as settings from "./settings.js";

const $ = (id) => document.getElementById(id);
const READY_MS = 10000; // between two looks at the server
const WAITING_MS = 1000;
const SOON_MS = 300; // after a letter of the API key

let contexts = {}; // tokens, by model
let listed = ""; // the server's default model when they were listed
let timer = 0;
let told = () => {}; // called after each look
export let served = ""; // the name of the chosen model
export let context = 0; // its tokens; 0: not known yet

export const several = () => Object.keys(contexts).length > 1;

/** Lists the models again soon. */
export function forget() {
  listed = "";
  next(SOON_MS);
}

/** Takes the model that is chosen in the settings. */
export function pick() {
  served = settings.model();
  context = contexts[served] ?? 0;
  $("name").textContent = $("greeted").textContent = served;
  document.title = `${served} · axrun`;
}

/** Looks at the server again and again; `seen()` is called after each answer. */
export function watch(seen) {
  told = seen;
  look();
}

function next(delay) {
  clearTimeout(timer);
  timer = setTimeout(look, delay);
}

async function look() {
  const health = $("health");
  try {
    const response = await fetch("/health");
    const state = await response.json();
    health.className = response.ok ? "ok" : "";
    health.title = state.status === "ok" ? `ready: ${state.busy} of ${state.slots} slots busy` : state.status;
    if (listed !== state.model) await list(state);
    pick();
    told();
  } catch {
    health.className = "bad";
    health.title = "the server cannot be reached";
  }
  next(health.className === "ok" ? READY_MS : WAITING_MS);
}

/** The models that answer, or the default one if the server does not list them without an API key. */
async function list({ model, context_length: length }) {
  const headers = settings.key() ? { Authorization: `Bearer ${settings.key()}` } : {};
  const response = await fetch("/v1/models", { headers }).catch(() => null);
  const all = response?.ok ? (await response.json()).data : [];
  const answering = all.filter(({ text }) => text !== false); // others are for embeddings
  contexts = Object.fromEntries(answering.map(({ id, context_length: other }) => [id, other]));
  if (!answering.length) contexts[model] = length;
  listed = model;
  settings.offer(Object.keys(contexts));
}
