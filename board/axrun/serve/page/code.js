// Code blocks with a language label and a copy button; copying to the clipboard.

export function element(kind, className, text) {
  const made = document.createElement(kind);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export function button(text, act) {
  const made = element("button", "", text);
  made.type = "button";
  made.addEventListener("click", () => act(made));
  return made;
}

export function codeBlock(code, language) {
  const block = element("div", "code");
  const head = element("div", "head");
  const pre = element("pre");
  pre.tabIndex = 0; // so that the arrow keys scroll a wide block
  pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  pre.append(element("code", "", code));
  head.append(
    element("span", "language", language),
    button("Copy", (pressed) => copy(pressed, code, pre)),
  );
  block.append(head, pre);
  return block;
}

/** Copies a text and confirms on the button; if the browser refuses, selects `shown` for the user to copy. */
export async function copy(pressed, text, shown) {
  const done = (await byClipboard(text)) || byCommand(text);
  if (!done) getSelection().selectAllChildren(shown);
  pressed.textContent = done ? "Copied" : "Press Ctrl+C";
  setTimeout(() => (pressed.textContent = "Copy"), 2000);
}

async function byClipboard(text) {
  if (!navigator.clipboard) return false; // available only over https and on localhost
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

function byCommand(text) {
  const before = document.activeElement;
  const area = element("textarea", "aside");
  area.value = text;
  area.readOnly = true;
  document.body.append(area);
  area.select();
  try {
    return document.execCommand("copy");
  } catch {
    return false;
  } finally {
    area.remove();
    before?.focus();
  }
}
