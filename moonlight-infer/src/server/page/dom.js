// Helpers to build elements. Text becomes a text node always: nothing on this page parses HTML.

const SVG = "http://www.w3.org/2000/svg";

/** The element with an id of the page's own HTML. */
export const byId = (id) => document.getElementById(id);

/** An element with properties, `on...` listeners, `aria-`/`data-`/other attributes, and children (strings are text). */
export function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  apply(element, options);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** An element of SVG. */
export function makeSvg(tag, options = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  apply(element, options);
  element.append(...children);
  return element;
}

function apply(element, options) {
  for (const [name, value] of Object.entries(options)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.setAttribute("class", value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
}

/** An icon of the sprite in the page. */
export const icon = (name) =>
  makeSvg("svg", { class: "icon", "aria-hidden": "true" }, makeSvg("use", { href: `#i-${name}` }));

/** A button that shows only an icon. */
export const iconButton = (name, label, onclick) =>
  make("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick }, icon(name));

/** Copies a text. Browsers offer the clipboard to secure origins only, so a page on another host uses the older way. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = make("textarea", { class: "hidden", "aria-hidden": "true", tabindex: "-1" });
    area.value = text;
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus?.();
    return copied;
  }
}

/** A button that copies the text that `text()` returns. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const copied = await copyText(text());
    if (copied) {
      button.replaceChildren(icon("check"));
      setTimeout(() => button.replaceChildren(icon("copy")), 1500);
    }
    toast(copied ? "Copied" : "The browser does not allow copying");
  });
  return button;
}

let toastTimer;

/** Shows a short message, with an action if there is one. */
export function toast(text, action, run) {
  const [box, button] = [byId("toast"), byId("toast-action")];
  byId("toast-text").textContent = text;
  button.hidden = !action;
  button.textContent = action ?? "";
  button.onclick = () => {
    box.hidden = true;
    run?.();
  };
  box.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (box.hidden = true), action ? 8000 : 2000 + 60 * text.length);
}

/** A number with few digits: `12,345`, `3.142`, `2.0e-4`. */
export function shortNumber(value, digits = 4) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size < 1e-3 || size >= 1e7) return value.toExponential(Math.max(digits - 3, 0)).replace(".0e", "e").replace("e+", "e");
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Number(value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 6 });
}
