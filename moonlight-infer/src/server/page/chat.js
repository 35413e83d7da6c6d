// The chat: conversations, messages, and the answers that stream into them.

import { ApiError, apiKey, getJson, setApiKey, stream } from "./api.js";
import { byId, copyButton, icon, iconButton, make, shortNumber, toast } from "./dom.js";
import * as store from "./store.js";
import { showText } from "./text.js";

/** How often a text is drawn while it is written, in milliseconds. */
const DRAW_EVERY = 50;
/** How often a conversation is saved while an answer is written, in milliseconds. */
const SAVE_EVERY = 2000;
/** How often the list of models is read again: a training that is served has new checkpoints. */
const MODELS_EVERY = 20_000;
/** Lines for screen readers that stay in the page. */
const SPOKEN_LINES = 30;
/** Codes of errors that say that the model has no chat template. */
const NO_TEMPLATE = ["no_chat_template", "chat_template_missing"];

export function startChat({ closeMenu }) {
  const input = byId("input");
  const thread = byId("thread");
  const messages = byId("messages");
  const settings = byId("settings");
  const overlay = matchMedia("(max-width: 64rem)");
  /** A screen without a keyboard: Enter adds a line, since there is no Shift, and the keyboard opens only on a touch. */
  const touchScreen = matchMedia("(pointer: coarse)");

  let conversations = store.loadConversations();
  const remembered = store.readOption("current", null);
  let current = conversations.find(({ id }) => id === remembered) ?? store.newConversation(store.readOption("system", ""));
  /** The answers that are being written, by the id of their conversation. */
  const live = new Map();
  /** Models that continue texts, because they have no chat template. */
  const withoutTemplate = new Set();
  let sampling = { ...store.DEFAULTS, ...store.readOption("sampling", {}) };
  let editing = null;
  let sticks = true;

  // Conversations

  function save(conversation) {
    if (conversation.messages.length === 0) return;
    try {
      const removed = store.saveConversation(conversation);
      if (removed.length > 0) {
        toast(`Storage is full: removed the oldest, “${removed[0]}”${removed.length > 1 ? ` and ${removed.length - 1} more` : ""}`);
        conversations = conversations.filter(({ id }) => id === conversation.id || live.has(id) || isStored(id));
      }
    } catch (error) {
      toast(error.message);
    }
  }

  const isStored = (id) => store.loadConversations().some((stored) => stored.id === id);

  function touch(conversation) {
    conversation.updated = Date.now();
    if (!conversations.includes(conversation)) conversations.unshift(conversation);
    conversations.sort((a, b) => b.updated - a.updated);
    save(conversation);
    store.writeOption("current", current.id);
    showList();
  }

  function open(conversation) {
    current = conversation;
    editing = null;
    sticks = true;
    store.writeOption("current", conversation.id);
    byId("system").value = conversation.system;
    byId("spoken").replaceChildren();
    showList();
    showMessages();
    closeMenu();
    focusInput();
  }

  const focusInput = () => touchScreen.matches || input.focus({ preventScroll: true });

  function remove(conversation) {
    live.get(conversation.id)?.controller.abort();
    conversations = conversations.filter((other) => other !== conversation);
    store.removeConversation(conversation.id);
    if (conversation === current) open(conversations[0] ?? store.newConversation(store.readOption("system", "")));
    else showList();
    toast(`Deleted “${store.titleOf(conversation)}”`, "Undo", () => {
      conversations.push(conversation);
      conversations.sort((a, b) => b.updated - a.updated);
      save(conversation);
      open(conversation);
    });
  }

  function rename(conversation) {
    const dialog = byId("rename");
    const field = byId("rename-input");
    field.value = store.titleOf(conversation);
    byId("rename-form").onsubmit = () => {
      conversation.title = field.value.trim();
      save(conversation);
      showList();
    };
    byId("rename-cancel").onclick = () => dialog.close();
    dialog.showModal();
    field.select();
  }

  function showList() {
    const entries = conversations.map((conversation) => {
      const title = store.titleOf(conversation);
      const isCurrent = conversation === current;
      return make(
        "li",
        { class: isCurrent ? "entry current" : "entry" },
        make("button", { type: "button", class: "open", "aria-current": isCurrent && "true", title, onclick: () => open(conversation) }, title),
        iconButton("edit", `Rename “${title}”`, () => rename(conversation)),
        iconButton("trash", `Delete “${title}”`, () => remove(conversation)),
      );
    });
    byId("conversations").replaceChildren(...entries);
    byId("chat-title").textContent = store.titleOf(current);
  }

  // Messages

  function showMessages() {
    const shown = current.messages.map((message, index) => messageElement(message, index));
    messages.replaceChildren(...shown);
    byId("empty").hidden = current.messages.length > 0;
    showSend();
    scrollDown();
  }

  function messageElement(message, index) {
    const label = message.role === "user" ? "Your message" : "Answer";
    if (index === editing) return make("li", { class: "message user", "aria-label": label }, editor(message, index));
    const text = make("div", { class: "text" });
    const foot = make("div", { class: "foot" });
    const element = make("li", { class: `message ${message.role}`, "aria-label": label }, text);
    if (message.role === "user") {
      text.textContent = message.content;
      foot.append(
        iconButton("edit", "Edit the message", () => edit(index)),
        copyButton("Copy the message", () => message.content),
      );
    } else {
      showAnswer(element, message);
      const isLast = index === current.messages.length - 1;
      if (!isLive(message)) {
        if (message.content) foot.append(copyButton("Copy the answer", () => message.content));
        if (isLast) foot.append(iconButton("again", "Write the answer again", regenerate));
      }
      if (message.note) foot.append(make("span", { class: "usage" }, message.note));
    }
    element.append(foot);
    return element;
  }

  const isLive = (message) => live.get(current.id)?.reply === message;

  /** Shows the text of an answer, and why it ended early. */
  function showAnswer(element, message) {
    const text = element.querySelector(".text");
    if (message.content) showText(text, message.content);
    else text.replaceChildren(...(isLive(message) ? [make("span", { class: "waiting", role: "img", "aria-label": "Waiting for the first token" })] : []));
    if (message.error) {
      const button = make("button", { type: "button", class: "text-button", onclick: regenerate }, "Try again");
      element.append(make("div", { class: "error", role: "alert" }, make("span", {}, message.error), button));
    }
  }

  function edit(index) {
    editing = index;
    showMessages();
    const field = messages.querySelector(".editing textarea");
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
    field.scrollIntoView({ block: "nearest" });
  }

  function editor(message, index) {
    const field = make("textarea", { "aria-label": "Your message", rows: 3 });
    field.value = message.content;
    const leave = () => {
      editing = null;
      showMessages();
      input.focus();
    };
    const send = () => {
      const text = field.value.trim();
      if (!text) return;
      stop();
      editing = null;
      current.messages.length = index;
      ask(text);
      input.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.preventDefault();
        leave();
      } else if (isSendKey(event)) {
        event.preventDefault();
        send();
      }
    });
    return make(
      "div",
      { class: "editing" },
      field,
      make(
        "div",
        { class: "row" },
        make("button", { type: "button", class: "button", onclick: leave }, "Cancel"),
        make("button", { type: "button", class: "button primary", onclick: send }, "Send"),
      ),
    );
  }

  // Answers

  function ask(text) {
    current.messages.push({ role: "user", content: text });
    sticks = true;
    answer(current);
  }

  function regenerate() {
    stop();
    while (current.messages.at(-1)?.role === "assistant") current.messages.pop();
    if (current.messages.length > 0) answer(current);
  }

  function stop() {
    live.get(current.id)?.controller.abort();
  }

  /** The request for the next message of a conversation. */
  function body(conversation, model, asText) {
    const request = {
      model,
      stream: true,
      stream_options: { include_usage: true },
      temperature: sampling.temperature,
      top_p: sampling.topP,
      max_tokens: sampling.maxTokens,
    };
    if (sampling.topK > 0) request.top_k = sampling.topK;
    if (sampling.seed !== null) request.seed = sampling.seed;
    const said = conversation.messages.filter(({ content }) => content !== "");
    if (asText) {
      const system = conversation.system ? `${conversation.system}\n` : "";
      const texts = said.map(({ role, content }, index) => (role === "user" && index > 0 ? `\n${content}` : content));
      return { ...request, prompt: system + texts.join("") };
    }
    const system = conversation.system ? [{ role: "system", content: conversation.system }] : [];
    return { ...request, messages: [...system, ...said.map(({ role, content }) => ({ role, content }))] };
  }

  async function answer(conversation) {
    const model = byId("model").value;
    const reply = { role: "assistant", content: "" };
    const controller = new AbortController();
    const requests = withoutTemplate.has(model)
      ? [["/v1/completions", body(conversation, model, true)]]
      : [["/v1/chat/completions", body(conversation, model, false)], ["/v1/completions", body(conversation, model, true)]];
    conversation.messages.push(reply);
    live.set(conversation.id, { controller, reply });
    touch(conversation);
    if (conversation === current) showMessages();

    const clock = { start: performance.now(), first: null, last: null, saved: performance.now(), drawn: 0 };
    const result = { usage: null, finish: null, stopped: false };
    const spoken = speaker();
    try {
      for (const [path, request] of requests) {
        try {
          await read(path, request, conversation, reply, controller.signal, clock, result, spoken);
          break;
        } catch (error) {
          const retry = path.includes("chat") && error instanceof ApiError && NO_TEMPLATE.includes(error.code);
          if (!retry) throw error;
          withoutTemplate.add(model);
          toast("This model has no chat template; it continues your text");
        }
      }
    } catch (error) {
      if (error.name === "AbortError") result.stopped = true;
      else if (error instanceof ApiError) reply.error = error.message;
      else reply.error = controller.signal.aborted ? "" : "The connection was lost";
      if (error.status === 401) askForKey();
    }
    // An edited message may have started another answer since.
    if (live.get(conversation.id)?.reply === reply) live.delete(conversation.id);
    reply.note = noteOf(reply, clock, result);
    // An answer that was stopped before its first token leaves nothing to show.
    if (!reply.content && !reply.error) {
      if (result.stopped) conversation.messages = conversation.messages.filter((message) => message !== reply);
      else reply.note = "The answer is empty";
    }
    if (conversations.includes(conversation)) touch(conversation);
    if (conversation === current) {
      if (editing === null) showMessages();
      spoken.end(result.stopped ? "Stopped" : reply.error ? "" : "End of the answer");
    }
  }

  /** Reads one stream into the reply. */
  async function read(path, request, conversation, reply, signal, clock, result, spoken) {
    for await (const event of stream(path, request, signal)) {
      const choice = event.choices?.[0];
      const text = choice?.delta?.content ?? choice?.text ?? "";
      result.finish = choice?.finish_reason ?? result.finish;
      result.usage = event.usage ?? result.usage;
      if (typeof text !== "string" || text === "") continue;
      const now = performance.now();
      clock.first ??= now;
      clock.last = now;
      reply.content += text;
      if (now - clock.saved > SAVE_EVERY) {
        clock.saved = now;
        save(conversation);
      }
      if (conversation !== current) continue;
      spoken.add(text);
      draw(reply, clock);
    }
  }

  /** Draws a reply that is being written, but not at every token. */
  function draw(reply, clock) {
    if (clock.timer || editing !== null) return;
    const wait = Math.max(0, clock.drawn + DRAW_EVERY - performance.now());
    clock.timer = setTimeout(() => {
      clock.timer = null;
      clock.drawn = performance.now();
      const element = messages.lastElementChild;
      if (!isLive(reply) || editing !== null || !element) return;
      showText(element.querySelector(".text"), reply.content);
      scrollDown();
    }, wait);
  }

  function noteOf(reply, clock, { usage, finish, stopped }) {
    const parts = [];
    const tokens = usage?.completion_tokens;
    if (Number.isFinite(tokens)) {
      parts.push(`${tokens.toLocaleString("en")} token${tokens === 1 ? "" : "s"}`);
      const seconds = (clock.last - clock.first) / 1000;
      if (tokens > 1 && seconds > 0) parts.push(`${shortNumber((tokens - 1) / seconds, 3)} tokens/s`);
    }
    if (clock.first !== null) parts.push(`first after ${shortNumber((clock.first - clock.start) / 1000, 2)} s`);
    if (stopped) parts.push("stopped");
    else if (finish === "length") parts.push("ended at the longest answer");
    return parts.join(" · ");
  }

  /** Gives the answer to screen readers in complete lines or sentences, since single tokens cannot be followed. */
  function speaker() {
    let rest = "";
    const say = (text) => {
      if (!text.trim()) return;
      const box = byId("spoken");
      box.append(make("p", {}, text.trim()));
      while (box.childElementCount > SPOKEN_LINES) box.firstElementChild.remove();
    };
    return {
      add(text) {
        rest += text;
        const end = Math.max(rest.lastIndexOf("\n"), rest.search(/[.!?…:;]\s[^.!?…:;]*$/));
        if (end >= 0 && end < rest.length - 1) {
          say(rest.slice(0, end + 1));
          rest = rest.slice(end + 1);
        }
      },
      end(text) {
        say(rest);
        say(text);
      },
    };
  }

  // Scrolling

  function scrollDown() {
    if (sticks) thread.scrollTop = thread.scrollHeight;
    showJump();
  }

  const isAtEnd = () => thread.scrollHeight - thread.scrollTop - thread.clientHeight < 60;

  function showJump() {
    byId("jump").hidden = isAtEnd();
  }

  thread.addEventListener("scroll", () => {
    sticks = isAtEnd();
    showJump();
  });
  byId("jump").addEventListener("click", () => {
    sticks = true;
    scrollDown();
    input.focus();
  });

  // Composer

  const isSendKey = (event) => event.key === "Enter" && !event.shiftKey && !touchScreen.matches && !event.isComposing && event.keyCode !== 229;

  function showSend() {
    const button = byId("send");
    const isWriting = live.has(current.id);
    button.setAttribute("aria-label", isWriting ? "Stop" : "Send");
    button.replaceChildren(icon(isWriting ? "stop" : "send"));
    button.disabled = !isWriting && input.value.trim() === "";
  }

  function fit() {
    // Browsers without `field-sizing` need the height of the text.
    if (CSS.supports("field-sizing", "content")) return;
    input.style.height = "auto";
    input.style.height = `${input.scrollHeight}px`;
  }

  function send() {
    const text = input.value.trim();
    if (!text || live.has(current.id)) return;
    input.value = "";
    fit();
    ask(text);
  }

  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (live.has(current.id)) stop();
    else send();
    input.focus();
  });
  input.addEventListener("input", () => {
    fit();
    showSend();
  });
  input.addEventListener("keydown", (event) => {
    if (isSendKey(event)) {
      event.preventDefault();
      send();
    } else if (event.key === "ArrowUp" && input.value === "" && !live.has(current.id)) {
      const index = current.messages.findLastIndex(({ role }) => role === "user");
      if (index >= 0) {
        event.preventDefault();
        edit(index);
      }
    }
  });
  byId("new-chat").addEventListener("click", () => open(store.newConversation(store.readOption("system", ""))));

  // Models

  async function readModels() {
    try {
      const { data } = await getJson("/v1/models");
      const ids = (Array.isArray(data) ? data : []).map(({ id }) => id).filter((id) => typeof id === "string");
      showModels(ids);
      byId("notice").hidden = true;
    } catch (error) {
      if (error.status === 401) askForKey();
      showNotice(error.status === 401 ? "The server asks for an API key" : `The models cannot be listed: ${error.message}`, error.status === 401);
    }
  }

  function showModels(ids) {
    const select = byId("model");
    const options = modelOptions(ids);
    const known = [...select.options].map(({ value, textContent }) => `${value}\n${textContent}`).join("\n");
    if (options.map(({ id, label }) => `${id}\n${label}`).join("\n") === known) return;
    const chosen = select.value || store.readOption("model", "");
    select.replaceChildren(...options.map(({ id, label }) => make("option", { value: id }, label)));
    if (options.some(({ id }) => id === chosen)) select.value = chosen;
    byId("empty-text").textContent = ids.length > 0
      ? "Conversations stay in this browser."
      : "The server has no model yet.";
  }

  /** A training that is served is listed twice: as its newest checkpoint, `run`, and with the step, `run@step-00000100`. */
  function modelOptions(ids) {
    const steps = new Map();
    for (const id of ids) {
      const match = /^(.+)@step-0*(\d+)$/.exec(id);
      if (match && ids.includes(match[1])) steps.set(match[1], Number(match[2]));
    }
    const isOfStep = (id) => steps.has(id.replace(/@step-\d+$/, "")) && !steps.has(id);
    const label = (id) => (steps.has(id) ? `${id}, step ${steps.get(id).toLocaleString("en")}` : id);
    return ids.filter((id) => !isOfStep(id)).map((id) => ({ id, label: label(id) }));
  }

  function showNotice(text, isKey) {
    byId("notice-text").textContent = text;
    const button = byId("notice-retry");
    button.textContent = isKey ? "Enter a key" : "Try again";
    button.onclick = () => (isKey ? askForKey(true) : readModels());
    byId("notice").hidden = false;
  }

  byId("model").addEventListener("change", () => store.writeOption("model", byId("model").value));

  // Settings

  function openSettings() {
    settings.hidden = false;
    byId("settings-open").setAttribute("aria-expanded", "true");
    if (overlay.matches) {
      byId("scrim").hidden = false;
      byId("main").inert = true;
      byId("side").inert = true;
    }
    byId("settings-close").focus();
  }

  function closeSettings() {
    if (settings.hidden) return false;
    settings.hidden = true;
    byId("settings-open").setAttribute("aria-expanded", "false");
    byId("scrim").hidden = true;
    byId("main").inert = false;
    byId("side").inert = false;
    byId("settings-open").focus();
    return true;
  }

  let hasAskedForKey = false;

  function askForKey(again = false) {
    if (hasAskedForKey && !again) return;
    hasAskedForKey = true;
    openSettings();
    byId("key").focus();
  }

  byId("settings-open").addEventListener("click", () => (settings.hidden ? openSettings() : closeSettings()));
  byId("settings-close").addEventListener("click", closeSettings);
  byId("scrim").addEventListener("click", closeSettings);
  overlay.addEventListener("change", closeSettings);

  function showSampling() {
    for (const [id, value] of [["temperature", sampling.temperature], ["top-p", sampling.topP]]) {
      byId(id).value = value;
      byId(`${id}-value`).textContent = Number(value).toFixed(2);
    }
    byId("top-k").value = sampling.topK;
    byId("max-tokens").value = sampling.maxTokens;
    byId("seed").value = sampling.seed ?? "";
  }

  /** Takes the value of a field if it is within its limits; an invalid one is marked and not used. */
  function bind(id, name, read) {
    const field = byId(id);
    field.addEventListener("input", () => {
      const value = read(field);
      const isValid = field.validity.valid && value !== undefined;
      field.setAttribute("aria-invalid", String(!isValid));
      if (!isValid) return;
      sampling[name] = value;
      store.writeOption("sampling", sampling);
      const output = byId(`${id}-value`);
      if (output) output.textContent = value.toFixed(2);
    });
    field.addEventListener("blur", () => {
      field.setAttribute("aria-invalid", "false");
      showSampling();
    });
  }

  const whole = (field) => (field.value === "" ? undefined : Math.trunc(field.valueAsNumber));
  bind("temperature", "temperature", (field) => field.valueAsNumber);
  bind("top-p", "topP", (field) => field.valueAsNumber);
  bind("top-k", "topK", whole);
  bind("max-tokens", "maxTokens", whole);
  bind("seed", "seed", (field) => (field.value === "" && !field.validity.badInput ? null : whole(field)));
  byId("reset").addEventListener("click", () => {
    sampling = { ...store.DEFAULTS };
    store.writeOption("sampling", sampling);
    showSampling();
  });
  byId("system").addEventListener("input", () => {
    current.system = byId("system").value;
    store.writeOption("system", current.system);
  });
  byId("system").addEventListener("change", () => save(current));
  byId("key").value = apiKey();
  byId("key").addEventListener("change", () => {
    setApiKey(byId("key").value.trim());
    readModels();
  });

  byId("export").addEventListener("click", () => {
    if (conversations.length === 0) {
      toast("There is no conversation to export");
      return;
    }
    const address = URL.createObjectURL(new Blob([store.exportText(conversations)], { type: "application/json" }));
    const day = new Date().toISOString().slice(0, 10);
    make("a", { href: address, download: `moonlight-conversations-${day}.json` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10_000);
  });
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (!file) return;
    try {
      if (file.size > 16 << 20) throw new Error("The file is larger than 16 MiB");
      const imported = store.importText(await file.text());
      imported.forEach(save);
      conversations = [...imported, ...conversations].sort((a, b) => b.updated - a.updated);
      showList();
      toast(`Imported ${imported.length} conversation${imported.length === 1 ? "" : "s"}`);
    } catch (error) {
      toast(error.message);
    }
  });

  // Start

  store.onOtherTab((id) => {
    if (id !== null && live.has(id)) return; // this tab is writing it
    const stored = store.loadConversations();
    // What this tab shows or writes stays the same object.
    const kept = conversations.filter((one) => one === current || live.has(one.id));
    conversations = [...stored.filter((one) => !kept.some(({ id }) => id === one.id)), ...kept];
    const changed = stored.find((one) => one.id === current.id);
    if (changed && editing === null && !live.has(current.id)) {
      conversations[conversations.indexOf(current)] = changed;
      current = changed;
      showMessages();
    }
    conversations.sort((a, b) => b.updated - a.updated);
    showList();
  });
  addEventListener("pagehide", () => {
    for (const conversation of conversations.filter(({ id }) => live.has(id))) save(conversation);
  });

  byId("system").value = current.system;
  showSampling();
  showList();
  showMessages();
  readModels();
  setInterval(() => {
    if (!document.hidden && !byId("chat").hidden) readModels();
  }, MODELS_EVERY);

  return {
    show(isShown) {
      if (isShown) focusInput();
      else closeSettings();
    },
    /** Escape closes the settings if they have the focus or cover the page, and stops the answer otherwise. */
    escape() {
      const isInSettings = overlay.matches || settings.contains(document.activeElement);
      if (!isInSettings || !closeSettings()) stop();
    },
  };
}
