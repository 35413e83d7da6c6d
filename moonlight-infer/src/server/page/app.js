// The frame of the page: its two views, the theme, the menu of narrow screens.

import { byId, icon } from "./dom.js";
import { startChat } from "./chat.js";
import { startRuns } from "./runs.js";

const THEMES = {
  system: { name: "System theme", icon: "auto" },
  light: { name: "Light theme", icon: "sun" },
  dark: { name: "Dark theme", icon: "moon" },
};

function storedTheme() {
  try {
    const theme = localStorage.getItem("moonlight.theme");
    return theme in THEMES ? theme : "system";
  } catch {
    return "system";
  }
}

function showTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme-name").textContent = THEMES[theme].name;
  byId("theme").querySelector(".icon").replaceWith(icon(THEMES[theme].icon));
}

function startTheme() {
  let theme = storedTheme();
  showTheme(theme);
  byId("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    theme = names[(names.indexOf(theme) + 1) % names.length];
    showTheme(theme);
    try {
      localStorage.setItem("moonlight.theme", theme);
    } catch {
      // Storage is blocked: the theme is lost with the next reload.
    }
  });
}

const narrow = matchMedia("(max-width: 48rem)");
let opener = null;

/** Opens the menu of a narrow screen. What is under it cannot be reached until it is closed. */
function openMenu(button) {
  opener = button;
  byId("side").classList.add("open");
  byId("scrim").hidden = false;
  byId("main").inert = true;
  document.querySelectorAll("[data-menu]").forEach((other) => other.setAttribute("aria-expanded", "true"));
  byId("side-close").focus();
}

export function closeMenu() {
  if (!byId("side").classList.contains("open")) return false;
  byId("side").classList.remove("open");
  byId("scrim").hidden = true;
  byId("main").inert = false;
  document.querySelectorAll("[data-menu]").forEach((other) => other.setAttribute("aria-expanded", "false"));
  opener?.focus();
  return true;
}

function startMenu() {
  document.querySelectorAll("[data-menu]").forEach((button) => button.addEventListener("click", () => openMenu(button)));
  byId("side-close").addEventListener("click", closeMenu);
  byId("scrim").addEventListener("click", closeMenu);
  narrow.addEventListener("change", closeMenu);
}

const chat = startChat({ closeMenu });
const runs = startRuns({ closeMenu });

/** Shows the view that the address names. */
function showView() {
  const isRuns = location.hash === "#runs";
  byId("app").dataset.view = isRuns ? "runs" : "chat";
  for (const [name, shown] of [["chat", !isRuns], ["runs", isRuns]]) {
    byId(name).hidden = !shown;
    byId(`side-${name}`).hidden = !shown;
    const link = byId(`view-${name}`);
    if (shown) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  chat.show(!isRuns);
  runs.show(isRuns);
  document.title = isRuns ? "Runs – Moonlight" : "Moonlight";
}

startTheme();
startMenu();
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("main").focus();
});
addEventListener("hashchange", () => {
  showView();
  closeMenu();
});
addEventListener("keydown", (event) => {
  // A dialog closes itself.
  if (event.key !== "Escape" || event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
  if (!closeMenu()) chat.escape();
});
showView();
