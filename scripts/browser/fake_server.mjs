// A server with the page and scripted answers: what a model cannot be made to say or do on demand. Answers depend on the last
// message of the user. The page, its types and its content security policy are those of the program, read from its source.

import { createServer } from "node:http";
import { readFile, readdir, stat } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const SERVER = join(dirname(fileURLToPath(import.meta.url)), "../../moonlight-infer/src/server");

/** Marks of one letter, of two kinds, and without a partner. */
export const INLINE = "Takes `a` and `b`, **x** and **y z**, ``c`d`` and `e f`; `open and **open.";

/** A question with a long answer, for pictures. */
export const QUESTION = "How large should the learning rate of Muon be?";

/** Output that would run code if any of it became HTML. */
export const HOSTILE = [
  `<img src=x onerror="window.hacked = 1">`,
  `<script>window.hacked = 1</script><svg onload="window.hacked = 1">`,
  `[a link](javascript:window.hacked=1) <a href="javascript:window.hacked=1">b</a>`,
  `**<b onclick="window.hacked = 1">bold</b>** and \`<i>code</i>\``,
  "```html\n<iframe src=\"javascript:window.hacked=1\"></iframe>\n```",
].join("\n\n");

export const LONG = `A learning rate is the size of a step. Muon orthogonalizes each update, so its size does not depend on the gradient's.

## In numbers

Three things follow:

1. The update of a matrix has an **RMS of about 0.2**, as AdamW's.
2. The same rate fits matrices of all shapes, because the scale contains \`sqrt(max(rows, columns))\`.
3. A warm-up of a few hundred steps is enough.

\`\`\`rust
let muon = MuonConfig::new()
    .with_learning_rate(2e-2)
    .with_momentum(0.95)
    .init();
model = muon.step(model, gradients);
\`\`\`

The first steps are the ones to watch: if the gradient norm grows, lower the rate.`;

const pieces = (text) => text.match(/\s*\S{1,6}|\s+/g) ?? [];
const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** Starts the server. `key`: the API key that it asks for. `runs`: a folder of runs. */
export async function startFakeServer({ key = null, runs = null, port = 0 } = {}) {
  const source = await readFile(join(SERVER, "page.rs"), "utf8");
  const policy = /POLICY: &str = "([^;]*(?:;[^;"]*)*)";/s.exec(source)[1].replace(/\\\n\s*/g, "");
  const assets = new Map([...source.matchAll(/"(\/[^"]*)" "([^"]+)" ([A-Z]+),/g)].map(([, path, file, type]) => {
    const types = { HTML: "text/html; charset=utf-8", CSS: "text/css; charset=utf-8", SCRIPT: "text/javascript; charset=utf-8", SVG: "image/svg+xml" };
    return [path, { file, type: types[type] }];
  }));
  const state = { requests: [], closed: 0, models: ["moonlight-tiny", "base", "demo", "demo@step-00000100"] };

  const server = createServer(async (request, response) => {
    const { pathname, searchParams } = new URL(request.url, "http://localhost");
    const json = (status, value) => {
      response.writeHead(status, { "content-type": "application/json" });
      response.end(JSON.stringify(value));
    };
    const error = (status, message, code = null) => json(status, { error: { message, type: "invalid_request_error", param: null, code } });
    try {
      const asset = assets.get(pathname);
      if (asset) {
        response.writeHead(200, { "content-type": asset.type, "content-security-policy": policy, "cache-control": "no-store" });
        response.end(await readFile(join(SERVER, "page", asset.file)));
        return;
      }
      if (key && request.headers.authorization !== `Bearer ${key}`) return error(401, "an API key is required: `Authorization: Bearer KEY`", "missing_api_key");
      if (pathname === "/v1/models") return json(200, { object: "list", data: state.models.map((id) => ({ id, object: "model" })) });
      if (pathname.startsWith("/v1/")) {
        let text = "";
        for await (const part of request) text += part;
        const body = JSON.parse(text);
        state.requests.push({ path: pathname, body });
        response.on("close", () => (state.closed += response.writableEnded ? 0 : 1));
        return await complete(pathname.includes("chat"), body, response, error);
      }
      if (pathname.startsWith("/api/runs") && runs) return await showRuns(runs, pathname, searchParams, json, error);
      error(404, `there is no route GET \`${pathname}\``);
    } catch (problem) {
      if (!response.headersSent) error(500, String(problem));
      else response.destroy();
    }
  });
  await new Promise((resolve) => server.listen(port, "127.0.0.1", resolve));
  return { state, url: `http://127.0.0.1:${server.address().port}`, close: () => (server.closeAllConnections(), server.close()) };
}

async function complete(isChat, body, response, error) {
  if (isChat && body.model === "base") return error(400, "the model has no chat template: use /v1/completions", "no_chat_template");
  const said = isChat ? body.messages.at(-1).content : body.prompt;
  if (said === "busy") return error(429, "the queue is full (32 requests); try again later", "queue_full");
  const send = (value) => response.write(`data: ${JSON.stringify(value)}\r\n\r\n`);
  const choice = (text, finish_reason = null) =>
    send({ choices: [{ index: 0, finish_reason, ...(isChat ? { delta: { content: text } } : { text }) }] });
  response.writeHead(200, { "content-type": "text/event-stream", "cache-control": "no-cache" });
  response.write(": open\n\n");
  if (isChat) send({ choices: [{ index: 0, finish_reason: null, delta: { role: "assistant", content: "" } }] });
  const answers = { html: HOSTILE, inline: INLINE, long: LONG, [QUESTION]: LONG, slow: "word ".repeat(2000), midway: "One. Two.", cut: "One. Two.", empty: "" };
  const isSlow = said === "slow";
  const answer = pieces(answers[said] ?? (!isChat ? " and so on" : said.length > 1000 ? "That is long." : `You said: ${said}`));
  let count = 0;
  for (const piece of answer) {
    if (response.destroyed) return;
    choice(piece);
    count++;
    await sleep(isSlow ? 25 : 3);
  }
  if (said === "midway") {
    send({ error: { message: "the request took longer than 600 s", type: "server_error", code: "timeout" } });
    return response.end();
  }
  if (said === "cut") {
    await sleep(1000); // a browser forgets what it has not read when a connection breaks
    return response.destroy();
  }
  choice("", count >= body.max_tokens ? "length" : "stop");
  send({ choices: [], usage: { prompt_tokens: 12, completion_tokens: count, total_tokens: 12 + count } });
  response.end("data: [DONE]\n\n");
}

/** The routes of `moonlight-train/src/serve/runs.rs`, without their limits. */
async function showRuns(folder, pathname, query, json, error) {
  const text = (path) => readFile(path, "utf8").catch(() => "");
  const records = (text) => text.split("\n").flatMap((line) => {
    try {
      return [JSON.parse(line)];
    } catch {
      return [];
    }
  });
  const [, , , encoded, part] = pathname.split("/");
  const names = (await readdir(folder)).sort();
  const summary = async (name) => {
    const lines = records(await text(join(folder, name, "metrics.jsonl")));
    const steps = Number(/^steps = (\d+)/m.exec(await text(join(folder, name, "recipe.toml")))?.[1] ?? 0);
    const last = (split) => lines.findLast((line) => line.split === split);
    const step = last("train")?.step ?? 0;
    return { name, state: step >= steps ? "finished" : "running", step, steps, loss: last("train")?.loss, valid_loss: last("valid")?.loss, modified: 0 };
  };
  if (!encoded) return json(200, { runs: await Promise.all(names.map(summary)), left_out: 0 });
  const name = decodeURIComponent(encoded);
  if (!names.includes(name)) return error(404, `there is no run \`${name}\``, "run_not_found");
  const run = join(folder, name);
  if (!part) {
    const recipe = await text(join(run, "recipe.toml"));
    const number = (key) => Number(new RegExp(`^${key} = (\\d+)`, "m").exec(recipe)?.[1] ?? 0);
    const settings = { train: { steps: number("steps"), batch_size: number("batch_size"), gradient_accumulation: number("gradient_accumulation") }, optimizer: { name: "muon" } };
    return json(200, { ...(await summary(name)), recipe, settings, checkpoints: [400, 300], evaluation: null });
  }
  const path = join(run, part === "metrics" ? "metrics.jsonl" : "samples.jsonl");
  const content = await readFile(path).catch(() => Buffer.alloc(0));
  const file = String((await stat(path).catch(() => ({ ino: 0 }))).ino);
  const after = query.get("file") === file ? Number(query.get("after") ?? 0) : 0;
  const end = content.lastIndexOf("\n") + 1;
  if (part === "samples") return json(200, { samples: records(content.toString()), unchanged: after === content.length && after > 0, next: content.length, file });
  const added = content.subarray(after, end).toString();
  const found = records(added).filter(({ split }) => split);
  const damaged = added.split("\n").filter((line) => line.trim()).length - found.length;
  json(200, { records: found, next: end, size: content.length, file, restarted: after === 0 && query.has("file"), every: 1, damaged });
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { url } = await startFakeServer({ runs: process.argv[2] ?? null, port: Number(process.argv[3] ?? 8090) });
  console.log(url);
}
