// Conversations in the browser's storage, one entry each, so that two tabs do not overwrite each other's.

const PREFIX = "moonlight.conversation.";
const OPTIONS = "moonlight.options";
const FORMAT = "moonlight-conversations";
/** Browsers keep about 5 million characters for a page. */
const MAX_CHARACTERS = 4_000_000;
const MAX_CONVERSATIONS = 200;
const MAX_MESSAGES = 2000;
const MAX_TITLE = 120;
const ROLES = ["user", "assistant"];

export const DEFAULTS = { temperature: 0.7, topP: 0.95, topK: 0, maxTokens: 1024, seed: null };

/** The storage; in memory if the browser blocks it. */
const storage = (() => {
  try {
    localStorage.setItem("moonlight.test", "");
    localStorage.removeItem("moonlight.test");
    return localStorage;
  } catch {
    const entries = new Map();
    return {
      getItem: (key) => entries.get(key) ?? null,
      setItem: (key, value) => void entries.set(key, value),
      removeItem: (key) => void entries.delete(key),
      key: (index) => [...entries.keys()][index] ?? null,
      get length() {
        return entries.size;
      },
    };
  }
})();

export function readOption(name, otherwise) {
  try {
    return JSON.parse(storage.getItem(OPTIONS) ?? "{}")[name] ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function writeOption(name, value) {
  let options = {};
  try {
    options = JSON.parse(storage.getItem(OPTIONS) ?? "{}");
  } catch {
    // Damaged options are replaced.
  }
  try {
    storage.setItem(OPTIONS, JSON.stringify({ ...options, [name]: value }));
  } catch {
    // Full: the option is lost with the next reload.
  }
}

/** Random and not `crypto.randomUUID`, which a page without TLS on another host does not have. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(9));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(system = "") {
  const now = Date.now();
  return { id: newId(), title: "", system, created: now, updated: now, messages: [] };
}

/** What a conversation is called in lists. */
export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = conversation.messages.find((message) => message.role === "user");
  const line = first?.content.trim().split("\n")[0] ?? "";
  return line.slice(0, 60) || "New conversation";
}

function keys() {
  const found = [];
  for (let index = 0; index < storage.length; index++) {
    const key = storage.key(index);
    if (key?.startsWith(PREFIX)) found.push(key);
  }
  return found;
}

/** A conversation from JSON of any origin, with the fields that the page uses; null if it is none. */
function conversationFrom(value) {
  if (typeof value !== "object" || value === null || !Array.isArray(value.messages)) return null;
  const isMessage = (message) =>
    message && ROLES.includes(message.role) && typeof message.content === "string" && (message.content !== "" || typeof message.error === "string");
  const text = (value, most) => (typeof value === "string" ? value.slice(0, most) : "");
  const time = (value) => (Number.isFinite(value) ? value : Date.now());
  const messages = value.messages.filter(isMessage).slice(0, MAX_MESSAGES).map((message) => {
    const kept = { role: message.role, content: message.content };
    if (typeof message.note === "string") kept.note = message.note.slice(0, 300);
    if (typeof message.error === "string") kept.error = message.error.slice(0, 2000);
    return kept;
  });
  // The format of training data has the system prompt as the first message.
  const system = value.messages.find((message) => message?.role === "system" && typeof message.content === "string");
  return {
    id: /^[0-9a-f]{4,40}$/.test(value.id) ? value.id : newId(),
    title: text(value.title, MAX_TITLE),
    system: text(value.system || system?.content, 100_000),
    created: time(value.created),
    updated: time(value.updated),
    messages,
  };
}

/** All conversations, the one that changed last first. */
export function loadConversations() {
  const found = [];
  for (const key of keys()) {
    try {
      const conversation = conversationFrom(JSON.parse(storage.getItem(key)));
      if (conversation) found.push(conversation);
    } catch {
      // A damaged entry is ignored; it is replaced when its conversation is saved again.
    }
  }
  return found.sort((a, b) => b.updated - a.updated);
}

/**
 * Saves a conversation, and removes the oldest others if there is no place for it. Returns the titles of those, and throws an
 * error if there is no place even then.
 */
export function saveConversation(conversation) {
  const messages = conversation.messages
    .filter(({ content, error }) => content !== "" || error)
    .map(({ role, content, note, error }) => ({ role, content, note, error }));
  const text = JSON.stringify({ ...conversation, messages });
  const removed = [];
  if (text.length > MAX_CHARACTERS) throw new Error("This conversation is too long to be kept in the browser");
  const own = PREFIX + conversation.id;
  const others = loadConversations().filter(({ id }) => id !== conversation.id);
  let characters = text.length + others.reduce((sum, { id }) => sum + (storage.getItem(PREFIX + id)?.length ?? 0), 0);
  const removeOldest = () => {
    const oldest = others.pop();
    characters -= storage.getItem(PREFIX + oldest.id)?.length ?? 0;
    storage.removeItem(PREFIX + oldest.id);
    removed.push(titleOf(oldest));
  };
  while (others.length > 0 && (characters > MAX_CHARACTERS || others.length >= MAX_CONVERSATIONS)) removeOldest();
  for (;;) {
    try {
      storage.setItem(own, text);
      return removed;
    } catch {
      if (others.length === 0) throw new Error("The browser has no place for this conversation");
      removeOldest();
    }
  }
}

export function removeConversation(id) {
  storage.removeItem(PREFIX + id);
}

export function exportText(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 2) + "\n";
}

/** The conversations of an exported file. */
export function importText(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON");
  }
  const list = value?.format === FORMAT ? value.conversations : [value];
  if (!Array.isArray(list)) throw new Error("The file has no conversations");
  const known = new Set(loadConversations().map(({ id }) => id));
  const found = list.slice(0, MAX_CONVERSATIONS).map(conversationFrom).filter((one) => one && one.messages.length > 0);
  if (found.length === 0) throw new Error("The file has no conversations");
  // An imported copy does not replace the conversation that it was exported from.
  return found.map((conversation) => (known.has(conversation.id) ? { ...conversation, id: newId() } : conversation));
}

/** Calls `changed` when another tab changes a conversation. */
export function onOtherTab(changed) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) changed(event.key?.slice(PREFIX.length) ?? null);
  });
}
