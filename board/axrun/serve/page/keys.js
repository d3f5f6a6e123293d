// Keyboard shortcuts, and the dialog that lists them.

import { element } from "./code.js";

const KEYS = {
  KeyN: ["N", "new chat"],
  KeyC: ["C", "show or hide the conversations"],
  KeyS: ["S", "show or hide the settings"],
  KeyI: ["I", "go to the message field"],
  KeyE: ["E", "edit the last question"],
  KeyR: ["R", "try the last answer again"],
  Comma: [",", "previous version of the last answer"],
  Period: [".", "next version of the last answer"],
  KeyH: ["H", "show this list"],
};
const OTHERS = [
  ["Enter", "send the message"],
  ["Shift Enter", "new line"],
  ["Ctrl Enter", "save an edited turn"],
  ["Escape", "stop the answer, or close what is open"],
];

/** `acts`: a function for each key of KEYS; the dialog opens itself. */
export function listen(acts) {
  const dialog = document.getElementById("keys");
  const list = document.getElementById("key-list");
  const lines = [...Object.values(KEYS).map(([key, what]) => [`Alt ${key}`, what]), ...OTHERS];
  for (const [keys, what] of lines) {
    const term = element("dt");
    term.append(...keys.split(" ").map((key) => element("kbd", "", key)));
    list.append(term, element("dd", "", what));
  }
  const all = { ...acts, KeyH: () => dialog.showModal() };
  document.getElementById("keys-button").addEventListener("click", all.KeyH);
  document.getElementById("keys-close").addEventListener("click", () => dialog.close());
  document.addEventListener("keydown", (event) => {
    const { altKey, ctrlKey, metaKey, shiftKey, code } = event;
    if (!altKey || ctrlKey || metaKey || shiftKey || !Object.hasOwn(KEYS, code) || dialog.open) return;
    event.preventDefault();
    all[code]();
  });
}
