// What of a conversation the model is shown. Questions without an answer are left out, and where the context gets full
// the oldest turns, many at a time: the server keeps what it has read of a conversation as long as its beginning stays.

const FULL = 0.75; // of the context: the rest is for the answer
const AFTER = 0.5; // of it, at most, is used once turns have been left out
const PER_MESSAGE = 6; // tokens that a template adds, about
const USUAL_RATE = 0.4; // tokens a character: English takes less, other scripts more
const ENOUGH = 200; // characters, to measure a rate

/** The messages to send; an answer that is still empty is not among them. */
export function shown(conversation, system) {
  const { messages, start } = conversation;
  const sent = system ? [{ role: "system", content: system }] : [];
  for (let at = start; at < messages.length; at += 2) {
    const [question, answer] = [messages[at], messages[at + 1]];
    const answered = Boolean(answer?.content.trim());
    if (!answered && at + 2 < messages.length) continue;
    for (const { role, content } of answered ? [question, answer] : [question]) sent.push({ role, content });
  }
  return sent;
}

/** Tokens that messages take, about; `rate` is tokens a character. */
export function estimate(sent, rate = USUAL_RATE) {
  return Math.round(sent.reduce((sum, { content }) => sum + content.length * rate + PER_MESSAGE, 0));
}

/** The rate at which messages took so many tokens; undefined for too few to tell. */
export function rateOf(sent, tokens) {
  const characters = sent.reduce((sum, { content }) => sum + content.length, 0);
  return characters < ENOUGH ? undefined : Math.max(tokens - PER_MESSAGE * sent.length, 1) / characters;
}

/** Raises `conversation.start` until what is sent leaves room for an answer, or only the question is left. */
export function makeRoom(conversation, system, context) {
  const { rate } = conversation;
  if (!context || estimate(shown(conversation, system), rate) <= context * FULL) return;
  while (leaveOut(conversation, 1) && estimate(shown(conversation, system), rate) > context * AFTER);
}

/** Leaves out some more of the oldest turns: a number, or else half of them. False when only the question is left. */
export function leaveOut(conversation, turns) {
  const left = Math.ceil(conversation.messages.length / 2) - 1 - conversation.start / 2;
  if (left < 1) return false;
  conversation.start += 2 * Math.min(left, turns ?? Math.ceil(left / 2));
  return true;
}
