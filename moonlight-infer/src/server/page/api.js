// Requests to the server that the page comes from.

const KEY = "moonlight.key";
/** An event of a stream that is longer was not sent by this server. */
const MAX_EVENT = 4 << 20;

/** An answer that is an error, or no answer. `status` is 0 if the server was not reached. */
export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The API key, which this tab keeps until it is closed. */
export function apiKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

export function setApiKey(key) {
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // Storage is blocked: the key is lost with the next reload.
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  const key = apiKey();
  if (key) headers.authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, credentials: "same-origin", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached");
  }
  if (!answer.ok) throw await errorOf(answer);
  return answer;
}

async function errorOf(answer) {
  const text = (await answer.text().catch(() => "")).slice(0, 2000);
  try {
    const { error } = JSON.parse(text);
    if (error?.message) return new ApiError(String(error.message), answer.status, error.code ?? error.type ?? null);
  } catch {
    // Not JSON: a proxy's page, or nothing.
  }
  return new ApiError(`The server answered ${answer.status}${answer.statusText ? ` ${answer.statusText}` : ""}`, answer.status);
}

/** The JSON of an answer. */
export async function getJson(path, signal) {
  const answer = await request(path, { signal });
  try {
    return await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The answer of the server cannot be read", answer.status);
  }
}

/** The events of a completion as they come, each parsed. */
export async function* stream(path, body, signal) {
  const answer = await request(path, {
    method: "POST",
    headers: { "content-type": "application/json", accept: "text/event-stream" },
    body: JSON.stringify(body),
    signal,
  });
  let ended = false;
  for await (const data of serverSentEvents(answer.body)) {
    if (data === "[DONE]") {
      ended = true;
      break;
    }
    let event;
    try {
      event = JSON.parse(data);
    } catch {
      throw new ApiError("The stream contains an event that is not JSON", answer.status);
    }
    if (event.error) {
      throw new ApiError(String(event.error.message ?? "The server ended the answer"), answer.status, event.error.code ?? null);
    }
    yield event;
  }
  if (!ended) throw new ApiError("The connection ended before the answer did", answer.status);
}

/** The `data` of each event. Comments, which keep a connection open, and other fields are ignored. */
async function* serverSentEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let [rest, data] = ["", []];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += decoder.decode(value, { stream: !done });
      if (rest.length > MAX_EVENT) throw new ApiError("The stream contains an event that is too long");
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = done ? "" : lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length > 0) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
      if (done) {
        if (data.length > 0) yield data.join("\n");
        return;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
