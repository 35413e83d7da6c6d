// Shows a text of a model: code blocks, inline code, bold and headings of Markdown. All of it is untrusted, so it becomes text
// nodes in elements that are named here. Links are not made, and images are not loaded.

import { copyButton, make } from "./dom.js";

/** The blocks of a text: `{kind: "code" | "heading" | "text", text, language}`. */
export function blocksOf(source) {
  const blocks = [];
  let [paragraph, code] = [[], null];
  const flush = () => {
    const text = paragraph.join("\n").replace(/^\n+|\s+$/g, "");
    if (text) blocks.push({ kind: "text", text });
    paragraph = [];
  };
  for (const line of source.split("\n")) {
    const fence = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/.exec(line);
    if (code) {
      const closes = fence && fence[1][0] === code.fence[0] && fence[1].length >= code.fence.length && !fence[2].trim();
      if (closes) {
        blocks.push({ kind: "code", text: code.lines.join("\n"), language: code.language });
        code = null;
      } else code.lines.push(line);
    } else if (fence) {
      flush();
      code = { fence: fence[1], language: fence[2].trim().split(/\s/)[0].slice(0, 30), lines: [] };
    } else if (/^#{1,6} \S/.test(line)) {
      flush();
      blocks.push({ kind: "heading", text: line.replace(/^#+ /, "") });
    } else if (line.trim() === "") {
      flush();
    } else {
      paragraph.push(line);
    }
  }
  // A block that is still written is shown as code from its first line.
  if (code) blocks.push({ kind: "code", text: code.lines.join("\n"), language: code.language });
  flush();
  return blocks;
}

/** Text with inline code and bold. A mark without its partner stays as it is. */
function inline(text) {
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(/(`+)([^`](?:[^\n]*?[^`])??)\1(?!`)|\*\*(\S(?:[^\n]*?\S)??)\*\*/g)) {
    if (match.index > at) nodes.push(text.slice(at, match.index));
    nodes.push(match[3] === undefined ? make("code", {}, match[2]) : make("strong", {}, match[3]));
    at = match.index + match[0].length;
  }
  if (at < text.length) nodes.push(text.slice(at));
  return nodes;
}

function element({ kind, text, language }) {
  switch (kind) {
    case "code": {
      const head = make("div", { class: "code-head" }, make("span", {}, language || "code"), copyButton("Copy the code", () => text));
      return make("div", { class: "code" }, head, make("pre", { tabindex: "0" }, make("code", {}, text)));
    }
    case "heading":
      return make("p", { class: "heading" }, ...inline(text));
    default:
      return make("p", {}, ...inline(text));
  }
}

/** Shows `source` in `container`. Blocks that did not change stay, so that a selection in them survives a stream. */
export function showText(container, source) {
  const blocks = blocksOf(source);
  const shown = container.blocks ?? [];
  const isSame = (a, b) => a && a.kind === b.kind && a.text === b.text && a.language === b.language;
  let same = 0;
  while (same < blocks.length && isSame(shown[same], blocks[same])) same++;
  while (container.childNodes.length > same) container.lastChild.remove();
  container.append(...blocks.slice(same).map(element));
  container.blocks = blocks;
}
