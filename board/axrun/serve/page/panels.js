// The conversations beside the chat, and the settings above it. On a narrow screen the former cover the chat.

import { save } from "./store.js";

const $ = (id) => document.getElementById(id);

export const narrow = () => !matchMedia("(min-width: 64rem)").matches;

export function togglePanel(name, open) {
  $(name).hidden = !open;
  $(`${name}-button`).setAttribute("aria-expanded", String(open));
}

/** Shows or hides a panel, and moves the focus to its field `first`, or back to its button. */
export function turnPanel(name, first) {
  const open = $(name).hidden;
  togglePanel(name, open);
  if (name === "chats" && !narrow()) save("localStorage", "axrun.panel", open);
  $(open ? first : `${name}-button`).focus();
}
