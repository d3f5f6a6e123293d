// The list of conversations: search, open, rename, delete, export, import.

import { button, element } from "./code.js";
import { conversationsOf, fileOf, MOST_BYTES } from "./validate.js";

const $ = (id) => document.getElementById(id);
const MOST_TITLE = 100; // characters

export class Chats {
  /** `open(id)` shows a conversation; `removed(id)` and `renamed(id, title)` are called after the change. */
  constructor(store, { open, removed, renamed }) {
    Object.assign(this, { store, open, removed, renamed });
    $("search").addEventListener("input", () => this.draw());
    $("export-all").addEventListener("click", () => this.download(this.store.list()));
    $("import").addEventListener("click", () => $("file").click());
    $("file").addEventListener("change", () => this.read());
  }

  draw() {
    if ($("chats").hidden || $("list").querySelector("input")) return;
    const all = this.store.list();
    const wanted = $("search").value.trim().toLowerCase();
    const found = wanted ? all.filter((one) => mentions(one, wanted)) : all;
    const [id, label] = this.focused();
    $("list").replaceChildren(...found.map((one) => this.item(one)));
    if (id) this.focus(id, label);
    $("found").textContent = wanted ? `${found.length} of ${all.length}` : all.length ? "" : "No conversations yet.";
    $("export-all").disabled = !all.length;
  }

  item(one) {
    const made = element("li");
    made.dataset.id = one.id;
    const opens = button("", () => this.open(one.id));
    opens.className = "open";
    opens.append(element("span", "title", one.title), element("small", "", new Date(one.saved).toLocaleDateString()));
    if (one.id === this.store.id) opens.setAttribute("aria-current", "true");
    const acts = element("span", "acts");
    for (const [label, act] of [
      ["Rename", () => this.edit(made, one)],
      ["Export", () => this.download([one])],
      ["Delete", () => this.remove(one)],
    ]) {
      const pressed = button(label, act);
      pressed.setAttribute("aria-label", `${label} ${one.title}`);
      acts.append(pressed);
    }
    made.append(opens, acts);
    return made;
  }

  edit(item, one) {
    const input = element("input");
    Object.assign(input, { value: one.title, maxLength: MOST_TITLE });
    input.setAttribute("aria-label", `New title of ${one.title}`);
    let done = false;
    const finish = (title) => {
      if (done) return;
      done = true;
      input.remove();
      if (title && title !== one.title) {
        if (this.store.rename(one.id, title) === null) this.tell("Not renamed: the storage of this browser is full or disabled.");
        else this.renamed(one.id, title);
      }
      this.draw();
      this.focus(one.id);
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") finish(input.value.trim());
      else if (event.key === "Escape") finish("");
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    input.addEventListener("blur", () => finish(input.value.trim()));
    item.replaceChildren(input);
    input.focus();
    input.select();
  }

  /** The conversation and the label of the button of the list that has the focus. */
  focused() {
    const pressed = document.activeElement.closest("#list button");
    return pressed ? [pressed.closest("li").dataset.id, pressed.textContent] : [];
  }

  /** Focuses a button of a conversation, the first by default. */
  focus(id, label) {
    const item = [...$("list").children].find(({ dataset }) => dataset.id === id);
    const buttons = [...(item?.querySelectorAll("button") ?? [])];
    (buttons.find(({ textContent }) => textContent === label) ?? buttons[0])?.focus();
  }

  remove(one) {
    if (!confirm(`Delete “${one.title}”? This cannot be undone.`)) return;
    this.store.remove(one.id);
    this.removed(one.id);
    this.draw();
    $("search").focus();
  }

  tell(text) {
    $("told").textContent = text;
  }

  /** Saves conversations as a file. */
  download(listed) {
    const conversations = listed.map(({ conversation }) => conversation);
    const address = URL.createObjectURL(new Blob([fileOf(conversations)], { type: "application/json" }));
    const day = new Date().toISOString().slice(0, 10);
    Object.assign(element("a"), { href: address, download: `axrun-chats-${day}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
    this.tell(`Exported ${counted(listed.length)}.`);
  }

  async read() {
    const [file] = $("file").files;
    $("file").value = "";
    if (!file) return;
    try {
      if (file.size > MOST_BYTES) throw new Error(`the file has more than ${MOST_BYTES >> 20} MiB`);
      const stored = [];
      for (const conversation of conversationsOf(await file.text())) {
        const id = this.store.put(conversation);
        if (id === null) {
          for (const each of stored) this.store.remove(each);
          throw new Error("the storage of this browser is full or disabled");
        }
        stored.push(id);
      }
      this.tell(`Imported ${counted(stored.length)}.`);
    } catch (error) {
      this.tell(`Nothing was imported: ${error.message}.`);
    }
    this.draw();
  }
}

function mentions({ title, conversation }, wanted) {
  if (title.toLowerCase().includes(wanted)) return true;
  return conversation.messages.some(({ content }) => content.toLowerCase().includes(wanted));
}

const counted = (number) => `${number} conversation${number === 1 ? "" : "s"}`;
