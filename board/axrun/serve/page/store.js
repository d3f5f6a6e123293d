// Conversations stored in this browser, one entry each. Several tabs may show the same one: the first tab that continues
// it keeps it; another tab that continues it too gets a copy. Nothing is overwritten, and nothing deleted unasked.

import { create, titleOf } from "./conversation.js";
import { conversationOf } from "./validate.js";

const PREFIX = "axrun.chat.";

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

export class Store {
  /**
   * `busy()`: this tab is changing the conversation. `adopt(conversation)`: another tab has changed it.
   * `listed()`: the list has changed.
   */
  constructor(busy, adopt, listed) {
    Object.assign(this, { busy, adopt, listed });
    addEventListener("storage", (event) => this.changed(event));
  }

  /** The conversation with this id, by default that of this tab, in a new tab the latest; an empty one if it is gone. */
  open(id = load("sessionStorage", "axrun.chat", null) ?? this.list()[0]?.id) {
    const found = read(id);
    this.take(found ? id : token(), found?.version ?? null);
    return found?.conversation ?? create();
  }

  /** Starts a new conversation, which is stored when it is saved. */
  create() {
    this.take(token(), null);
    return create();
  }

  /** Saves the conversation of this tab; returns false if the browser refuses. */
  save(conversation) {
    if ((read(this.id)?.version ?? null) !== this.version) this.take(token(), null);
    const version = token();
    if (!write(this.id, { ...conversation, version, parent: this.version })) return false;
    this.version = version;
    return true;
  }

  /** Stores a further conversation; returns its id, or null if the browser refuses. */
  put(conversation) {
    const id = token();
    return write(id, { ...conversation, version: token(), parent: null }) ? id : null;
  }

  rename(id, title) {
    const found = read(id);
    if (!found) return null;
    const version = token();
    const { conversation } = found;
    if (!write(id, { ...conversation, title, version, parent: found.version })) return null;
    if (id === this.id) this.version = version;
    return title;
  }

  remove(id) {
    try {
      localStorage.removeItem(PREFIX + id);
    } catch {
      // storage is disabled, so nothing was stored
    }
  }

  /** {id, title, saved, conversation} of each conversation with messages, the latest first. */
  list() {
    return stored()
      .map((id) => ({ id, ...read(id) }))
      .filter(({ conversation }) => conversation?.messages.length)
      .map(({ id, saved, conversation }) => ({ id, title: titleOf(conversation), saved, conversation }))
      .sort((one, other) => other.saved - one.saved);
  }

  take(id, version) {
    this.id = id;
    this.version = version;
    save("sessionStorage", "axrun.chat", id);
  }

  changed(event) {
    if (event.storageArea !== localStorage || (event.key !== null && !event.key.startsWith(PREFIX))) return;
    if (event.key === null || event.key === PREFIX + this.id) this.follow();
    this.listed();
  }

  /** Follows a change of the conversation of this tab by another. */
  follow() {
    const now = read(this.id);
    if (now?.version === this.version) return;
    if (now && !this.busy() && now.parent === this.version) {
      this.version = now.version;
      this.adopt(now.conversation);
    } else if (this.version !== null) {
      this.take(token(), null); // saved there with the next change
    }
  }
}

function write(id, value) {
  return save("localStorage", PREFIX + id, { ...value, saved: Date.now() });
}

/** A stored conversation with what the store knows of it, or null if malformed. */
function read(id) {
  const { version, parent, saved, ...value } = load("localStorage", PREFIX + id, null) ?? {};
  try {
    return { version: version ?? null, parent, saved: Number(saved) || 0, conversation: conversationOf(grown(value)) };
  } catch {
    return null;
  }
}

/** Of version 0.1: a plain list of messages, of which the first `start` were left out. */
function grown({ start, ...value }) {
  if (start === undefined || !Array.isArray(value.messages)) return value;
  const messages = value.messages.map((message, index) => ({ parent: index - 1, ...message }));
  if (start > 0 && messages.length) messages.at(-1).start = start;
  return { title: "", leaf: messages.length - 1, ...value, messages };
}

/** Ids of the stored conversations. */
function stored() {
  try {
    return Object.keys(localStorage)
      .filter((key) => key.startsWith(PREFIX))
      .map((key) => key.slice(PREFIX.length));
  } catch {
    return [];
  }
}
