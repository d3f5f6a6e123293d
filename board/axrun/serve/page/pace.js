// Draws an answer in progress at most once a frame, and within a share of the time.

const SHARE = 4; // spend at most 1/SHARE of the time

/** Calls `draw` after `later()`. If the end of `log` is in view, it stays there. */
export function paced(log, draw) {
  let pending = false;
  let due = 0;
  const run = () => {
    if (!pending) return;
    const below = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    const began = performance.now();
    draw();
    if (below) log.scrollTop = log.scrollHeight;
    const now = performance.now();
    due = now + (SHARE - 1) * (now - began);
    pending = false;
  };
  return {
    later() {
      if (!pending) setTimeout(() => requestAnimationFrame(run), due - performance.now());
      pending = true;
    },
    cancel: () => (pending = false),
  };
}
