// The runs of the server's folder: their curves while they train, samples of their texts, their recipes.

import { ApiError, getJson } from "./api.js";
import { Chart } from "./chart.js";
import { byId, copyButton, make, shortNumber } from "./dom.js";
import { RunRecords, smooth } from "./series.js";
import { readOption, writeOption } from "./store.js";

/** How often new lines of metrics are read, in milliseconds. */
const POLL = 2000;
/** Every how many polls the list is read again. */
const LIST_EVERY = 3;
const COLORS = 8;
/** Parts of a long file that are read one after the other before the page draws. */
const PARTS = 64;

const METRICS = [
  { key: "loss", title: "Loss", unit: "nats per token", main: true, valid: true },
  { key: "lr", title: "Learning rate", exact: true },
  { key: "grad_norm", title: "Gradient norm", unit: "before clipping" },
  { key: "tokens_per_second", title: "Speed", unit: "tokens/s" },
  { key: "expert_imbalance", title: "Experts’ load", unit: "busiest over mean, worst layer" },
  { key: "dead_experts", title: "Experts without tokens" },
  { key: "max_attention_logit", title: "Largest attention logit" },
  { key: "update_rms_muon", title: "Update RMS, Muon" },
  { key: "update_rms_adamw", title: "Update RMS, AdamW" },
  { key: "memory_mib", title: "Memory", unit: "MiB" },
];

export function startRuns({ closeMenu }) {
  let [isShown, timer, polls, isPolling] = [false, null, 0, false];
  let runs = [];
  let isFirstList = true;
  /** Selected runs in the order of selection: name to `{color, records}`. */
  const selected = new Map();
  let detailed = null;
  let details = { key: null, samples: { next: 0, file: null } };
  const view = { axis: "step", scale: "linear", smoothing: 0, ...readOption("curves", {}) };

  const charts = METRICS.map((metric) => ({ metric, chart: new Chart(metric) }));
  byId("charts").append(...charts.map(({ chart }) => chart.element));

  // Reading

  async function poll() {
    if (isPolling) return;
    isPolling = true;
    clearTimeout(timer);
    try {
      if (polls++ % LIST_EVERY === 0) await readList();
      let changed = false;
      for (const [name, run] of selected) changed = (await readRun(name, run)) || changed;
      if (changed) draw();
      if (detailed) await readDetails();
      showLive(true);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      showError(error);
    } finally {
      isPolling = false;
      if (isShown) timer = setTimeout(() => !document.hidden && poll(), POLL);
    }
  }

  async function readList() {
    const answer = await getJson("/api/runs");
    runs = answer.runs;
    byId("runs-note").textContent = answer.left_out > 0 ? `${answer.left_out} older runs are not listed` : "";
    if (isFirstList && runs.length > 0) {
      isFirstList = false;
      const names = new Set(runs.map(({ name }) => name));
      const remembered = readOption("runs", []).filter((name) => names.has(name));
      (remembered.length > 0 ? remembered : [runs[0].name]).forEach(select);
    }
    const names = new Set(runs.map(({ name }) => name));
    [...selected.keys()].filter((name) => !names.has(name)).forEach(deselect);
    showList();
    showEmpty();
  }

  async function readRun(name, run) {
    let changed = false;
    for (let part = 0; part < PARTS; part++) {
      const { records } = run;
      const file = records.file ? `&file=${encodeURIComponent(records.file)}` : "";
      let answer;
      try {
        answer = await getJson(`${path(name)}/metrics?after=${records.next}${file}`);
      } catch (error) {
        if (error.status === 404) return changed; // no step was taken yet, or the run was removed
        throw error;
      }
      const before = records.next;
      changed = records.add(answer) || changed;
      if (answer.next >= answer.size || answer.next === before) break;
    }
    return changed;
  }

  const path = (name) => `/api/runs/${encodeURIComponent(name)}`;

  async function readDetails() {
    const name = detailed;
    const summary = runs.find((run) => run.name === name);
    try {
      // The recipe does not change while a run is in progress.
      const key = `${name}/${summary?.state}/${summary?.steps}`;
      if (details.key !== key) {
        const answer = await getJson(path(name));
        if (name !== detailed) return;
        details.key = key;
        showRecipe(answer);
      }
      const { next, file } = details.samples;
      const answer = await getJson(`${path(name)}/samples?after=${next}${file ? `&file=${encodeURIComponent(file)}` : ""}`);
      if (name !== detailed || answer.unchanged) return;
      details.samples = answer;
      showSamples(answer.samples);
    } catch (error) {
      if (error.status !== 404) throw error;
    }
  }

  // Selecting

  function select(name) {
    const used = new Set([...selected.values()].map(({ color }) => color));
    const color = [...Array(COLORS).keys()].find((color) => !used.has(color)) ?? selected.size % COLORS;
    selected.set(name, { color, records: new RunRecords() });
    if (!detailed) showDetailsOf(name);
  }

  function deselect(name) {
    selected.delete(name);
    if (detailed === name) showDetailsOf([...selected.keys()].at(-1) ?? null);
  }

  function toggle(name) {
    if (selected.has(name)) deselect(name);
    else {
      select(name);
      showDetailsOf(name);
    }
    writeOption("runs", [...selected.keys()]);
    showList();
    showEmpty();
    draw();
    poll();
  }

  function showDetailsOf(name) {
    detailed = name;
    details = { key: null, samples: { next: 0, file: null } };
    byId("panel-samples").replaceChildren();
    byId("panel-recipe").replaceChildren();
    byId("facts").textContent = "";
    byId("details-title").textContent = name ?? "";
    showChips();
  }

  // Showing

  function factsOf(run) {
    const number = (value) => value.toLocaleString("en");
    const steps = run.state === "finished" || !run.steps ? `${number(run.step)} steps` : `${number(run.step)}/${number(run.steps)}`;
    const loss = run.valid_loss ?? run.loss;
    const state = run.state === "finished" ? [] : [run.state];
    return [...state, steps, ...(loss === undefined ? [] : [`loss ${shortNumber(loss, 3)}`])].join(" · ");
  }

  function showList() {
    const list = byId("run-list");
    const shown = runs.map(({ name }) => name).join("\n");
    if (list.dataset.shown !== shown) {
      list.dataset.shown = shown;
      list.replaceChildren(
        ...runs.map(({ name }) => {
          const box = make("input", { type: "checkbox", onchange: () => toggle(name) });
          const text = make("span", {}, make("span", { class: "run-name" }, name), make("span", { class: "run-facts" }));
          return make("li", {}, make("label", { class: "run" }, box, text));
        }),
      );
    }
    // The entries stay, so that the focus does.
    runs.forEach((run, index) => {
      const entry = list.children[index];
      entry.querySelector("input").checked = selected.has(run.name);
      entry.querySelector(".run-facts").textContent = factsOf(run);
    });
    showChips();
  }

  function showChips() {
    const chips = byId("chips");
    const shown = [...selected].map(([name, { color }]) => `${name} ${color}`).join("\n");
    if (chips.dataset.shown !== shown) {
      chips.dataset.shown = shown;
      chips.replaceChildren(
        ...[...selected].map(([name, { color }]) => {
          const chip = make("button", { type: "button", class: "chip", title: `Show samples and recipe of ${name}` }, make("i", { class: `dot s${color}` }), make("b", {}, name), make("span", {}));
          chip.addEventListener("click", () => {
            showDetailsOf(name);
            poll();
          });
          return make("li", {}, chip);
        }),
      );
    }
    [...selected.keys()].forEach((name, index) => {
      const chip = chips.children[index].firstElementChild;
      const run = runs.find((run) => run.name === name);
      chip.setAttribute("aria-pressed", String(name === detailed));
      chip.querySelector("span").textContent = run ? factsOf(run) : "";
    });
  }

  function showEmpty(title, text) {
    const isEmpty = title !== undefined || selected.size === 0;
    byId("runs-empty").hidden = !isEmpty;
    byId("runs-content").hidden = isEmpty;
    byId("runs-empty-title").textContent = title ?? (runs.length === 0 ? "No runs yet" : "No run is selected");
    byId("runs-empty-text").textContent =
      text ?? (runs.length === 0 ? "A training that starts in the server's folder of runs appears here." : "Select runs in the list to see their curves.");
  }

  function showError(error) {
    showLive(false);
    if (error.status === 404) showEmpty("This server shows no runs", "Start it with --runs and the folder of your runs to see their curves here.");
    else if (error.status === 401) showEmpty("The server asks for an API key", "Enter it in the settings of the chat.");
    else if (selected.size === 0) showEmpty("The runs cannot be read", error.message);
    else byId("live").textContent = error.message;
  }

  function showLive(isRead) {
    const isRunning = [...selected.keys()].some((name) => runs.find((run) => run.name === name)?.state === "running");
    byId("live").classList.toggle("on", isRead && isRunning);
    if (isRead) byId("live").textContent = isRunning ? "live" : "";
  }

  function draw() {
    const notes = [...selected].flatMap(([name, { records }]) => records.notes().map((note) => `${name}: ${note}`));
    byId("curves-note").textContent = notes.join("; ");
    byId("curves-note").hidden = notes.length === 0;
    for (const { metric, chart } of charts) {
      const curves = [];
      for (const [name, { color, records }] of selected) {
        const points = records.points("train", metric.key, view.axis);
        const weight = metric.exact ? 0 : view.smoothing;
        if (weight > 0) curves.push({ name, color, kind: "pale", points });
        curves.push({ name, color, kind: "line", points: smooth(points, weight) });
        if (metric.valid) curves.push({ name, color, kind: "valid", points: records.points("valid", metric.key, view.axis) });
      }
      // Pale curves are under all others.
      curves.sort((a, b) => (b.kind === "pale") - (a.kind === "pale"));
      chart.update(curves, view);
    }
  }

  function showSamples(samples) {
    const panel = byId("panel-samples");
    if (samples.length === 0) {
      panel.replaceChildren(make("p", { class: "plain" }, "This run has no samples. Its recipe asks for them by sample.prompt."));
      return;
    }
    const shown = [...samples].reverse().map(({ step, prompt, text }) =>
      make("article", { class: "sample" }, make("h3", {}, `Step ${step.toLocaleString("en")}`), make("p", { tabindex: "0" }, make("b", {}, prompt), text)));
    panel.replaceChildren(...shown);
  }

  function showRecipe({ recipe, settings, checkpoints }) {
    const parts = [];
    const train = settings?.train;
    if (train) {
      const sequences = train.batch_size * train.gradient_accumulation;
      parts.push(`${train.steps.toLocaleString("en")} steps of ${sequences.toLocaleString("en")} sequences`);
    }
    if (settings?.optimizer?.name) parts.push(settings.optimizer.name);
    if (settings?.lora) parts.push(`LoRA of rank ${settings.lora.rank}`);
    if (checkpoints.length > 0) parts.push(`checkpoints after ${checkpoints.slice(0, 4).map((step) => step.toLocaleString("en")).join(", ")}`);
    byId("facts").textContent = parts.join(" · ");
    const head = make("div", { class: "code-head" }, make("span", {}, "recipe.toml"), copyButton("Copy the recipe", () => recipe));
    byId("panel-recipe").replaceChildren(
      recipe === null
        ? make("p", { class: "plain" }, "This run has no recipe.")
        : make("div", { class: "code recipe" }, head, make("pre", { tabindex: "0" }, make("code", {}, recipe))),
    );
  }

  // Controls

  function bind(id, name, read) {
    const field = byId(id);
    field.value = view[name];
    field.addEventListener("input", () => {
      view[name] = read(field);
      writeOption("curves", view);
      showSmoothing();
      draw();
    });
  }

  const showSmoothing = () => (byId("smoothing-value").textContent = view.smoothing ? view.smoothing.toFixed(2) : "off");
  bind("axis", "axis", (field) => field.value);
  bind("scale", "scale", (field) => field.value);
  bind("smoothing", "smoothing", (field) => field.valueAsNumber);
  showSmoothing();

  const tabs = [byId("tab-samples"), byId("tab-recipe")];
  function showTab(tab) {
    for (const other of tabs) {
      const isThis = other === tab;
      other.setAttribute("aria-selected", String(isThis));
      other.tabIndex = isThis ? 0 : -1;
      byId(other.getAttribute("aria-controls")).hidden = !isThis;
    }
  }
  for (const tab of tabs) {
    tab.addEventListener("click", () => showTab(tab));
    tab.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      const other = tabs[1 - tabs.indexOf(tab)];
      showTab(other);
      other.focus();
    });
  }
  document.addEventListener("visibilitychange", () => {
    if (isShown && !document.hidden) poll();
  });

  return {
    show(shown) {
      if (shown === isShown) return;
      isShown = shown;
      clearTimeout(timer);
      polls = 0;
      if (shown) {
        closeMenu();
        poll();
      }
    },
  };
}
