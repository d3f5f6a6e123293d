// Markdown to DOM nodes. Model output is untrusted: markdown-it escapes HTML, and DOMPurify allows only the elements
// listed here. Without the two libraries, text stays text and fences become code blocks.

import { codeBlock } from "/code.js";

const LINK = /^(?:https?:\/\/|mailto:)/i; // no relative URLs, no other schemes
const CLEAN = {
  ALLOWED_TAGS: [
    ...["p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "s", "code", "pre", "blockquote"],
    ...["ul", "ol", "li", "a", "table", "thead", "tbody", "tr", "th", "td"],
  ],
  ALLOWED_ATTR: ["href", "title", "start", "align", "class"],
  ALLOWED_URI_REGEXP: LINK,
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

let parser = null;
let purifier = null;

/** Loads the libraries; returns false if this server does not have them. */
export async function load() {
  try {
    const [markdownIt, purify] = await Promise.all([import("/lib/markdown-it.js"), import("/lib/purify.js")]);
    if (!purify.default.isSupported) return false;
    parser = configure(markdownIt.default);
    purifier = purify.default;
  } catch {
    return false;
  }
  return true;
}

function configure(markdownIt) {
  const made = markdownIt({ html: false, linkify: true, breaks: true });
  made.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
  made.validateLink = (address) => LINK.test(address);
  // Images are not fetched; they become links.
  made.renderer.rules.image = (tokens, index, options, env, self) => {
    const escaped = (text) => made.utils.escapeHtml(text);
    const alt = self.renderInlineAsText(tokens[index].children, options, env);
    const address = tokens[index].attrGet("src");
    return `<a href="${escaped(address)}">${escaped(alt || address)}</a>`;
  };
  // <br> is the only tag that is rendered: models use it for line breaks inside table cells.
  made.inline.ruler.push("br", (state, silent) => {
    const found = /^<br ?\/?>/i.exec(state.src.slice(state.pos, state.pos + 6));
    if (!found) return false;
    if (!silent) state.push("hardbreak", "br", 0);
    state.pos += found[0].length;
    return true;
  });
  // The content security policy of this page forbids style attributes.
  made.core.ruler.push("align", (state) => {
    for (const token of state.tokens) {
      const style = token.type === "th_open" || token.type === "td_open" ? token.attrGet("style") : null;
      if (style) token.attrs = [["align", style.replace("text-align:", "")]];
    }
  });
  return made;
}

/** A sanitised fragment of the HTML. */
export function clean(html) {
  const fragment = purifier.sanitize(html, CLEAN);
  for (const link of fragment.querySelectorAll("a")) {
    link.rel = "noopener noreferrer";
    link.target = "_blank";
  }
  return fragment;
}

/** A growing text: only its last block is parsed and rendered again. */
export class Writing {
  constructor(target) {
    this.target = target;
    this.text = "";
    this.done = 0; // characters in complete blocks
    this.open = []; // nodes of the last block
    this.env = {};
    target.classList.toggle("markdown", parser !== null);
  }

  /** Renders the text so far; `text` may only grow. */
  draw(text) {
    if (text === this.text) return;
    this.text = text;
    if (!parser) return this.target.replaceChildren(...plain(text));
    const rest = text.replace(/\r\n?/g, "\n").slice(this.done);
    const blocks = topLevel(parser.parse(rest, this.env));
    const last = blocks.pop() ?? [];
    for (const node of this.open) node.remove();
    for (const block of blocks) this.target.append(...this.render(block));
    this.open = this.render(last);
    this.target.append(...this.open);
    this.done += startOf(rest, last[0]?.map?.[0] ?? 0);
  }

  /** Renders the whole text again: a link reference may be defined after its use. */
  finish(text) {
    this.target.replaceChildren();
    Object.assign(this, { text: "", done: 0, open: [], env: {} });
    this.draw(text);
  }

  render(tokens) {
    const fragment = clean(parser.renderer.render(tokens, parser.options, this.env));
    for (const pre of fragment.querySelectorAll("pre")) {
      const language = pre.firstElementChild?.className.replace("language-", "") ?? "";
      pre.replaceWith(codeBlock(pre.textContent.replace(/\n$/, ""), language));
    }
    return [...fragment.childNodes];
  }
}

function topLevel(tokens) {
  const blocks = [];
  let depth = 0;
  for (const token of tokens) {
    if (depth === 0) blocks.push([]);
    blocks.at(-1).push(token);
    depth += token.nesting;
  }
  return blocks;
}

function startOf(text, line) {
  let at = 0;
  for (; line > 0; line -= 1) at = text.indexOf("\n", at) + 1;
  return at;
}

/** Plain text, with fenced code blocks as code: https://spec.commonmark.org/0.31.2/#fenced-code-blocks */
export function plain(text) {
  const nodes = [];
  let lines = [];
  let fence = null;
  const flush = () => {
    if (fence) nodes.push(codeBlock(lines.join("\n"), fence.language));
    else if (lines.length) nodes.push(document.createTextNode(lines.join("\n")));
    lines = [];
  };
  for (const line of text.split(/\r\n?|\n/)) {
    const marks = /^([\s>]*(?:(?:[-*+]|\d{1,9}[.)])\s+)*)(`{3,}|~{3,})\s*(.*)$/.exec(line);
    if (!fence && marks && !(marks[2][0] === "`" && marks[3].includes("`"))) {
      flush();
      fence = { mark: marks[2], indent: marks[1].length, language: marks[3].split(/\s/)[0] };
    } else if (fence && marks && !marks[3] && marks[2].startsWith(fence.mark)) {
      flush();
      fence = null;
    } else {
      const cut = fence ? Math.min(fence.indent, /^[\s>]*/.exec(line)[0].length) : 0;
      lines.push(line.slice(cut));
    }
  }
  flush();
  return nodes;
}
