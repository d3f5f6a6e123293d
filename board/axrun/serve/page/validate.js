// Conversations from outside: of an imported file, or of the browser's storage, where another page or version of this
// page may have written. What is not understood is refused by name.

export const FORMAT = "axrun conversations";
export const VERSION = 1;
export const MOST_BYTES = 16 << 20; // of a file
const MOST_CONVERSATIONS = 1000;
const MOST_MESSAGES = 10000; // of a conversation
const MOST_CALLS = 128; // of a message
const MOST_TEXT = 4 << 20; // characters
const MOST_NAME = 500;

const text = (most) => [(value) => typeof value === "string" && value.length <= most, `a text of up to ${most} characters`];
const one = (...values) => [(value) => values.includes(value), values.map((value) => JSON.stringify(value)).join(" or ")];
const count = (least = 0) => [(value) => Number.isSafeInteger(value) && value >= least, `a whole number of at least ${least}`];
const positive = [(value) => Number.isFinite(value) && value > 0, "a positive number"];
const list = (most) => [(value) => Array.isArray(value) && value.length <= most, `a list of up to ${most}`];

// field: [test, what is expected, required]
const CALL = {
  id: [...text(MOST_NAME), true],
  name: [...text(MOST_NAME), true],
  arguments: [...text(MOST_TEXT), true],
};
const MESSAGE = {
  role: [...one("user", "assistant", "tool"), true],
  content: [...text(MOST_TEXT), true],
  parent: [...count(-1), true],
  reasoning: text(MOST_TEXT),
  thought: count(), // milliseconds
  calls: list(MOST_CALLS), // {id, name, arguments}
  call: text(MOST_NAME), // the id of the call that this is the result of
  name: text(MOST_NAME), // the name of the tool
  model: text(MOST_NAME),
  figures: text(MOST_NAME),
  error: text(MOST_TEXT),
  seed: [Number.isSafeInteger, "a whole number"],
  tries: count(),
  tokens: count(), // of the prompt and the answer
  start: count(), // number of messages on the path that were left out of the prompt
  writing: one(true),
};
const CONVERSATION = {
  title: [...text(MOST_NAME), true],
  messages: [...list(MOST_MESSAGES), true],
  leaf: [...count(-1), true],
  rate: positive,
};
const FILE = {
  format: [...one(FORMAT), true],
  version: [...one(VERSION), true],
  conversations: [...list(MOST_CONVERSATIONS), true],
};
const AFTER = { user: ["user", "assistant", "tool"], assistant: ["user", "tool"], tool: ["assistant", "tool"] };

export class Invalid extends Error {}

const quoted = (value) => {
  if (Array.isArray(value)) return `a list of ${value.length}`;
  if (value !== null && typeof value === "object") return "an object"; // which may be nested too deep to be written
  const said = JSON.stringify(value) ?? "nothing";
  return said.length > 40 ? `${said.slice(0, 40)}…` : said;
};

/** A copy of an object that has these fields only. Throws Invalid. */
function fields(value, table, where) {
  if (value === null || typeof value !== "object" || Array.isArray(value))
    throw new Invalid(`${where} is ${quoted(value)}, expected an object`);
  for (const name of Object.keys(value))
    if (!Object.hasOwn(table, name)) throw new Invalid(`${where} has the unknown field ${quoted(name)}`);
  const made = {};
  for (const [name, [test, expected, required]] of Object.entries(table)) {
    const given = Object.hasOwn(value, name) ? value[name] : undefined;
    if (given === undefined && !required) continue;
    if (!test(given)) throw new Invalid(`${where}.${name} is ${quoted(given)}, expected ${expected}`);
    made[name] = given;
  }
  return made;
}

/** A checked copy of a conversation. Throws Invalid. */
export function conversationOf(value, where = "the conversation") {
  const made = fields(value, CONVERSATION, where);
  made.messages = made.messages.map((given, index) => {
    const at = `${where}.messages[${index}]`;
    const message = fields(given, MESSAGE, at);
    if (message.parent >= index) throw new Invalid(`${at}.parent is ${message.parent}, expected an earlier message`);
    const before = made.messages[message.parent]?.role;
    if (message.parent < 0 ? message.role !== "user" : !AFTER[message.role].includes(before))
      throw new Invalid(`${at} is of role ${message.role}, which cannot follow ${before ?? "the beginning"}`);
    if (message.calls) message.calls = message.calls.map((call, n) => fields(call, CALL, `${at}.calls[${n}]`));
    return message;
  });
  if (made.leaf >= made.messages.length || (made.leaf < 0 && made.messages.length))
    throw new Invalid(`${where}.leaf is ${made.leaf}, expected the index of a message`);
  return made;
}

/** The conversations of an exported file. Throws Invalid. */
export function conversationsOf(content) {
  let value;
  try {
    value = JSON.parse(content);
  } catch {
    throw new Invalid("the file is not JSON");
  }
  const { conversations } = fields(value, FILE, "the file");
  return conversations.map((conversation, index) => {
    const made = conversationOf(conversation, `conversations[${index}]`);
    for (const message of made.messages) delete message.writing;
    return made;
  });
}

/** The text of a file with these conversations. */
export function fileOf(conversations) {
  const written = conversations.map(({ title, messages, leaf, rate }) => {
    return { title, messages: messages.map((message) => ({ ...message, writing: undefined })), leaf, rate };
  });
  return `${JSON.stringify({ format: FORMAT, version: VERSION, conversations: written }, null, 1)}\n`;
}
