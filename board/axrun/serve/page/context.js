// The part of a conversation that is sent to the model. Questions without an answer are left out. When the context gets
// full, the oldest turns are left out, many at a time: the server's KV cache is reused as long as the prefix stays.

const FULL = 0.75; // share of the context for the prompt; the rest is for the answer
const AFTER = 0.5; // maximum share in use after turns were left out
const PER_MESSAGE = 6; // tokens that the template adds, roughly
const USUAL_RATE = 0.4; // tokens per character: less for English, more for other scripts
const ENOUGH = 200; // characters needed to measure the rate

/** The messages to send, without an answer that is still empty. */
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

/** Estimated tokens of messages; `rate` is tokens per character. */
export function estimate(sent, rate = USUAL_RATE) {
  return Math.round(sent.reduce((sum, { content }) => sum + content.length * rate + PER_MESSAGE, 0));
}

/** The measured rate in tokens per character; undefined for too short messages. */
export function rateOf(sent, tokens) {
  const characters = sent.reduce((sum, { content }) => sum + content.length, 0);
  return characters < ENOUGH ? undefined : Math.max(tokens - PER_MESSAGE * sent.length, 1) / characters;
}

/** Raises `conversation.start` until the prompt leaves room for an answer, or only the question is left. */
export function makeRoom(conversation, system, context) {
  const { rate } = conversation;
  if (!context || estimate(shown(conversation, system), rate) <= context * FULL) return;
  while (leaveOut(conversation, 1) && estimate(shown(conversation, system), rate) > context * AFTER);
}

/** Leaves out more of the oldest turns: `turns`, or half of them. Returns false if only the question is left. */
export function leaveOut(conversation, turns) {
  const left = Math.ceil(conversation.messages.length / 2) - 1 - conversation.start / 2;
  if (left < 1) return false;
  conversation.start += 2 * Math.min(left, turns ?? Math.ceil(left / 2));
  return true;
}
