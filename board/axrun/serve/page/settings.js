// The settings form. Sampling fields, their limits and descriptions are those of /openapi.json; docs/serve.md has them too.

import { element } from "./code.js";
import { load, save } from "./store.js";

const KEY = "axrun.settings";
const FIRST = { temperature: "Temperature", top_p: "Top-p", max_completion_tokens: "Longest answer", seed: "Seed" };
const MORE = {
  top_k: "Top-k",
  min_p: "Min-p",
  typical_p: "Typical-p",
  top_n_sigma: "Top-n-sigma",
  xtc_probability: "XTC probability",
  xtc_threshold: "XTC threshold",
  dry_multiplier: "DRY multiplier",
  dry_base: "DRY base",
  dry_allowed_length: "DRY allowed length",
  dry_penalty_last_n: "DRY range",
  repetition_penalty: "Repetition penalty",
  repeat_last_n: "Repetition range",
  presence_penalty: "Presence penalty",
  frequency_penalty: "Frequency penalty",
  thinking_budget: "Longest thoughts",
};
const NUMBERS = Object.keys({ ...FIRST, ...MORE });
const NAMES = ["theme", "model", "system", "thinking", "tools", "further", ...NUMBERS];
const ABSENT = { max_completion_tokens: "no limit", thinking_budget: "no limit", seed: "random" };
const OWN = ["messages", "stream", "stream_options", "n"]; // set by the page

const $ = (id) => document.getElementById(id);

/** Builds the fields and fills them with what is stored. `changed(name)` is called after a change. */
export function open(changed) {
  for (const [table, into] of [[FIRST, "samplers"], [MORE, "more-samplers"]])
    for (const [name, label] of Object.entries(table)) $(into).append(numberField(name, label));
  const kept = load("localStorage", KEY, {});
  for (const name of NAMES) if (name !== "model" && typeof kept?.[name] === "string") $(name).value = kept[name];
  $("model-choice").dataset.kept = typeof kept?.model === "string" ? kept.model : "";
  $("key").value = load("sessionStorage", "axrun.key", "");
  const store = (name) => {
    save("localStorage", KEY, Object.fromEntries(NAMES.map((each) => [each, $(each).value])));
    save("sessionStorage", "axrun.key", $("key").value);
    changed(name);
  };
  for (const kind of ["input", "change"]) $("settings").addEventListener(kind, ({ target }) => store(target.id));
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("reset").addEventListener("click", () => {
    for (const name of ["thinking", "tools", "further", ...NUMBERS]) $(name).value = "";
    store("reset");
  });
  describe();
}

function numberField(name, text) {
  const field = element("div", "field");
  const label = element("label", "", text);
  const input = element("input");
  label.htmlFor = name;
  Object.assign(input, { id: name, type: "number", step: "any", placeholder: ABSENT[name] ?? "default" });
  field.append(label, input);
  return field;
}

/** Limits and descriptions, from the server. */
async function describe() {
  const response = await fetch("/openapi.json").catch(() => null);
  const document = await response?.json().catch(() => null);
  const body = document?.paths["/v1/chat/completions"]?.post.requestBody.content["application/json"].schema;
  const schema = body?.$ref ? document.components.schemas[body.$ref.split("/").at(-1)] : body;
  for (const name of NUMBERS) {
    const field = schema?.properties?.[name];
    if (!field) continue;
    const limits = (field.anyOf ?? [field]).find(({ type }) => type !== "null");
    const input = $(name);
    if (limits.minimum !== undefined) input.min = limits.minimum;
    if (limits.maximum !== undefined) input.max = limits.maximum;
    if ([limits.type].flat().includes("integer")) input.step = 1;
    const bounded = limits.maximum < 1 << 30 ? ` From ${limits.minimum} to ${limits.maximum}.` : "";
    const help = element("small", "", `${field.description}${bounded}`);
    help.id = `${name}-help`;
    input.setAttribute("aria-describedby", help.id);
    input.after(help);
  }
}

/** The models of the server; a choice is shown if there are several. */
export function offer(models) {
  const select = $("model");
  const chosen = select.value || $("model-choice").dataset.kept;
  const offered = [...select.options].map(({ value }) => value);
  if (JSON.stringify(offered) === JSON.stringify(models)) return; // a list that the user has open stays open
  select.replaceChildren(...models.map((id) => Object.assign(element("option", "", id), { value: id })));
  if (models.includes(chosen)) select.value = chosen;
  $("model-choice").hidden = models.length < 2;
}

export const system = () => $("system").value.trim();
export const key = () => $("key").value;
export const model = () => $("model").value;
export const theme = () => $("theme").value;

/** The first of `seed`, or null for a random one. */
export const seed = () => ($("seed").value === "" ? null : Number($("seed").value));

/** The fields of a request. Throws an Error for a setting that is not valid JSON. */
export function fields() {
  const body = { ...parsed("further", "Further request fields", "object") };
  const taken = OWN.find((name) => name in body);
  if (taken) throw new Error(`Settings: the further request fields may not set ${taken}, which the page sets.`);
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
  if ($("thinking").value) body.enable_thinking = $("thinking").value === "on";
  const tools = parsed("tools", "Tools", "list");
  if (tools?.length) body.tools = tools;
  return body;
}

function parsed(name, label, kind) {
  const given = $(name).value.trim();
  if (!given) return null;
  try {
    const value = JSON.parse(given);
    const found = Array.isArray(value) ? "list" : typeof value;
    if (value !== null && found === kind) return value;
  } catch {
    // refused below
  }
  throw new Error(`Settings: ${label} must be JSON, ${kind === "list" ? "a list" : "an object"}.`);
}
