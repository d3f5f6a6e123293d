// The part of a conversation that is sent to the model. A turn is a question with all that follows it; turns without an
// answer are left out. When the context gets full, the oldest turns are left out, many at a time: the server's KV cache
// is reused as long as the prefix stays. `shown` are the messages that are shown, `start` the number left out of them.

const FULL = 0.75; // share of the context for the prompt; the rest is for the answer
const AFTER = 0.5; // maximum share in use after turns were left out
const PER_MESSAGE = 6; // tokens that the template adds, roughly
const USUAL_RATE = 0.4; // tokens per character: less for English, more for other scripts
const ENOUGH = 200; // characters needed to measure the rate

/** Index of the question of each turn. */
const questions = (shown) => [...shown.keys()].filter((at) => shown[at].role === "user");

const answered = (message) =>
  message.role === "assistant" && Boolean(message.content.trim() || message.calls?.length);

/** The messages to send, without an answer that is still empty. */
export function toSend(shown, start, system) {
  const sent = system ? [{ role: "system", content: system }] : [];
  const firsts = questions(shown).filter((at) => at >= start);
  firsts.forEach((first, number) => {
    const last = number === firsts.length - 1;
    const turn = shown.slice(first, firsts[number + 1]);
    if (last && turn.at(-1).role === "assistant" && !answered(turn.at(-1))) turn.pop();
    if (last || answered(turn.at(-1))) for (const message of turn) sent.push(asSent(message, last));
  });
  return sent;
}

/** Thoughts are sent only within the last turn, to go on with them after a call. */
function asSent({ role, content, reasoning, calls, call }, last) {
  if (role === "tool") return { role, content, tool_call_id: call };
  const made = { role, content };
  if (last && reasoning) made.reasoning_content = reasoning;
  if (calls?.length)
    made.tool_calls = calls.map(({ id, name, arguments: given }) => {
      return { id, type: "function", function: { name, arguments: given } };
    });
  return made;
}

const characters = (sent) =>
  sent.reduce((sum, { content, reasoning_content: thoughts, tool_calls: calls }) => {
    return sum + content.length + (thoughts?.length ?? 0) + (calls ? JSON.stringify(calls).length : 0);
  }, 0);

/** Estimated tokens of messages; `rate` is tokens per character. */
export function estimate(sent, rate = USUAL_RATE) {
  return Math.round(characters(sent) * rate + PER_MESSAGE * sent.length);
}

/** The measured rate in tokens per character; undefined for too short messages. */
export function rateOf(sent, tokens) {
  const length = characters(sent);
  return length < ENOUGH ? undefined : Math.max(tokens - PER_MESSAGE * sent.length, 1) / length;
}

/** The start that leaves room for an answer, or only the last question. */
export function makeRoom(shown, start, rate, system, context) {
  const used = (from) => estimate(toSend(shown, from, system), rate);
  if (!context || used(start) <= context * FULL) return start;
  for (let next = start; ; start = next) {
    next = leaveOut(shown, start, 1);
    if (next === start || used(next) <= context * AFTER) return next;
  }
}

/** The start with more of the oldest turns left out: `turns`, or half of them. The same if only the question is left. */
export function leaveOut(shown, start, turns) {
  const firsts = questions(shown).filter((at) => at >= start);
  const left = firsts.length - 1;
  return left < 1 ? start : firsts[Math.min(left, turns ?? Math.ceil(left / 2))];
}

/** The number of turns before `start`. */
export const turnsBefore = (shown, start) => questions(shown).filter((at) => at < start).length;
