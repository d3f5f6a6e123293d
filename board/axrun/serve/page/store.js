// Conversations stored in this browser: {messages: [{role, content, ...}], start}. Several tabs may show the same one.
// The first tab that continues it keeps it; another tab that continues it too gets a copy. Nothing is overwritten.

const PREFIX = "axrun.chat.";
const MOST = 20; // conversations; the oldest are removed

const token = () => [...crypto.getRandomValues(new Uint32Array(3))].map((word) => word.toString(36)).join("");

/** `storage` is the name localStorage or sessionStorage: if storage is disabled, even reading the property throws. */
export function load(storage, key, otherwise) {
  try {
    return JSON.parse(window[storage].getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Returns false if the browser's storage is full or disabled. */
export function save(storage, key, value) {
  try {
    window[storage].setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export const empty = () => ({ messages: [], start: 0 });

export class Store {
  /** `busy()`: this tab is changing the conversation. `adopt(conversation)`: another tab has changed it. */
  constructor(busy, adopt) {
    this.busy = busy;
    this.adopt = adopt;
    addEventListener("storage", (event) => this.changed(event));
  }

  /** The conversation of this tab, else the latest of this browser, else an empty one. */
  open() {
    const mine = load("sessionStorage", "axrun.chat", null);
    const id = mine && this.read(mine) ? mine : stored().at(-1)?.id;
    const found = id ? this.read(id) : null;
    this.take(found ? id : token(), found?.version ?? null);
    return found ?? empty();
  }

  /** Saves the conversation; returns false if the browser refuses. */
  save(conversation) {
    const before = this.read(this.id);
    if ((before?.version ?? null) !== this.version) this.take(token(), null);
    if (this.version === null) for (const old of stored().slice(0, 1 - MOST)) remove(old.id);
    const version = token();
    const value = { ...conversation, version, parent: this.version, saved: Date.now() };
    for (;;) {
      if (save("localStorage", PREFIX + this.id, value)) break;
      const oldest = stored().find(({ id }) => id !== this.id);
      if (!oldest) return false;
      remove(oldest.id);
    }
    this.version = version;
    return true;
  }

  /** Deletes the conversation and starts a new one. */
  forget() {
    remove(this.id);
    this.take(token(), null);
  }

  take(id, version) {
    this.id = id;
    this.version = version;
    save("sessionStorage", "axrun.chat", id);
  }

  read(id) {
    return checked(load("localStorage", PREFIX + id, null));
  }

  changed(event) {
    if (event.storageArea !== localStorage || (event.key !== null && event.key !== PREFIX + this.id)) return;
    const now = this.read(this.id);
    if (now?.version === this.version) return;
    if (now && !this.busy() && now.parent === this.version) {
      this.version = now.version;
      this.adopt(now);
    } else if (this.version !== null) {
      this.take(token(), null); // saved there with the next change
    }
  }
}

function remove(id) {
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // storage is disabled, so nothing was stored
  }
}

/** Ids of the stored conversations, oldest first. */
function stored() {
  try {
    return Object.keys(localStorage)
      .filter((key) => key.startsWith(PREFIX))
      .map((key) => ({ id: key.slice(PREFIX.length), saved: load("localStorage", key, null)?.saved ?? 0 }))
      .sort((one, other) => one.saved - other.saved);
  } catch {
    return [];
  }
}

/** The conversation, or null if malformed: another page or version of this page may have written it. */
function checked(value) {
  const { messages, start } = value ?? {};
  if (!Array.isArray(messages) || messages.length % 2 || ![...messages.keys(), messages.length].includes(start)) return null;
  const whole = messages.every(
    (message, index) => message?.role === (index % 2 ? "assistant" : "user") && typeof message.content === "string",
  );
  return whole && start % 2 === 0 ? value : null;
}
