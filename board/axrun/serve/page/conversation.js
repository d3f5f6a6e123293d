// A conversation is a tree of messages with one path shown: {title, messages, leaf, rate}. Each message has the index
// of its `parent`, -1 for a first question; a parent comes before its children. `leaf` is the index of the last message
// shown. Messages are only added: editing one, or generating an answer again, starts a branch beside it.

export const create = () => ({ title: "", messages: [], leaf: -1 });

/** Indices of the messages that are shown, or that lead to `leaf`. */
export function pathOf({ messages, leaf }, end = leaf) {
  const found = [];
  for (let at = end; at >= 0; at = messages[at].parent) found.push(at);
  return found.reverse();
}

/** The messages that are shown. */
export const shownOf = (conversation) => pathOf(conversation).map((at) => conversation.messages[at]);

/** Adds a message below `parent`, which ends the path from then on; returns its index. */
export function add(conversation, message, parent = conversation.leaf) {
  conversation.leaf = conversation.messages.push({ parent, ...message }) - 1;
  return conversation.leaf;
}

/** Indices of the versions of a message: those below the same parent, in the order in which they were added. */
export function versions({ messages }, at) {
  return [...messages.keys()].filter((other) => messages[other].parent === messages[at].parent);
}

/** Shows another version of a message, with what was last added below it. */
export function choose(conversation, at) {
  const below = new Set([at]);
  conversation.leaf = at;
  for (let index = at + 1; index < conversation.messages.length; index += 1)
    if (below.has(conversation.messages[index].parent)) {
      below.add(index);
      conversation.leaf = index;
    }
}

/** The title, or else the beginning of the first question. */
export function titleOf({ title, messages }) {
  const first = messages[0]?.content.trim().split("\n")[0] ?? "";
  return title || (first.length > 60 ? `${first.slice(0, 60)}…` : first) || "New chat";
}

/** The number of shown messages that are left out of the prompt, as it was for the last answer. */
export function startOf(shown) {
  const start = shown.findLast((message) => message.start !== undefined)?.start;
  return shown[start]?.role === "user" ? start : 0;
}
