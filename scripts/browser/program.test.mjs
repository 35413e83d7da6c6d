// The page with a server of the program: a tiny model is trained and served at the same time, so that the page shows a real
// answer, curves that grow, samples, and the step of the newest checkpoint.

import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";
import { openPage } from "./browser.mjs";

const { PROGRAM } = process.env;

const recipe = (home) => `[run]
name = "tiny"
dir = "${home}/runs"
device = "cpu"
[model]
vocab_size = 264
max_position_embeddings = 256
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2
kv_lora_rank = 8
qk_nope_head_dim = 8
qk_rope_head_dim = 4
v_head_dim = 8
n_routed_experts = 6
num_experts_per_tok = 2
moe_intermediate_size = 16
n_shared_experts = 1
first_k_dense_replace = 1
[data]
train = ["${home}/train.jsonl"]
valid_fraction = 0.1
format = "chat"
tokenizer = "bytes-chat"
sequence_length = 128
cache_dir = "${home}/cache"
[optimizer]
learning_rate = 5e-3
[train]
steps = 100000
batch_size = 2
validate_every = 20
validate_batches = 2
checkpoint_every = 20
plots = false
[sample]
prompt = "<b>"
max_new_tokens = 16
`;

const home = mkdtempSync(join(tmpdir(), "moonlight-served-"));
const children = [];

function start(...args) {
  const child = spawn(PROGRAM, args, { stdio: ["ignore", "pipe", "pipe"], env: { ...process.env, NO_COLOR: "1" } });
  child.log = "";
  child.output = "";
  child.stdout.on("data", (data) => (child.output += data));
  child.stderr.on("data", (data) => (child.log += data));
  child.ended = new Promise((resolve) => child.on("exit", (code, signal) => resolve(code ?? signal)));
  children.push(child);
  return child;
}

async function until(what, child, check) {
  for (let index = 0; index < 600; index++) {
    const found = check();
    if (found) return found;
    if (child.exitCode !== null) throw new Error(`${what}: the program ended\n${child.log}`);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  throw new Error(`${what}: nothing after a minute\n${child.log}`);
}

after(async () => {
  for (const child of children) child.kill("SIGKILL");
  await Promise.all(children.map(({ ended }) => ended));
  rmSync(home, { recursive: true, force: true });
});

test("a running training is served, and the page shows it", { skip: !PROGRAM && "SKIPPED: no program is given" }, async () => {
  const line = (index) => JSON.stringify({ messages: [{ role: "user", content: `count ${index}` }, { role: "assistant", content: "one two three four" }] });
  writeFileSync(join(home, "train.jsonl"), Array.from({ length: 200 }, (_, index) => line(index)).join("\n"));
  writeFileSync(join(home, "recipe.toml"), recipe(home));
  const training = start("train", join(home, "recipe.toml"));
  await until("the first checkpoint", training, () => {
    try {
      return readFileSync(join(home, "runs/tiny/samples.jsonl"), "utf8").includes("\n") && execFileSync("ls", [join(home, "runs/tiny/checkpoints")]).toString().includes("step-");
    } catch {
      return false;
    }
  });
  const server = start("serve", "--follow", join(home, "runs/tiny"), "--runs", join(home, "runs"), "--port", "0", "--device", "cpu", "--context", "256");
  const url = await until("the address", server, () => /http:\/\/[\d.:]+/.exec(server.output)?.[0]);

  const { page, problems, close } = await openPage(url);
  try {
    const step = () => page.locator("#model option").first().innerText();
    assert.match(await step(), /^tiny, step \d/);
    await page.click("#settings-open");
    await page.fill("#temperature", "0");
    await page.fill("#max-tokens", "40");
    await page.fill("#input", "count 3");
    await page.press("#input", "Enter");
    await page.waitForFunction(() => document.querySelector(".usage")?.innerText.includes("tokens/s"));
    assert.equal(await page.locator(".error").count(), 0);
    assert.match(await page.locator(".usage").innerText(), /^\d+ tokens · .* tokens\/s · first after/);

    await page.click("#view-runs");
    await page.waitForFunction(() => /tiny: [\d.]+ at step [\d,]+/.test(document.querySelector(".chart.main .plot").ariaLabel));
    const label = () => page.getAttribute(".chart.main .plot", "aria-label");
    const first = Number(/tiny: [\d.]+ at step ([\d,]+)/.exec(await label())[1].replace(",", ""));
    await page.waitForFunction((first) => Number(/at step ([\d,]+)/.exec(document.querySelector(".chart.main .plot").ariaLabel)[1].replace(",", "")) > first, first, { timeout: 20_000 });
    assert.equal(await page.innerText("#live"), "live");
    await page.waitForFunction(() => document.querySelector("#panel-samples").innerText.includes("<b>"));
    assert.equal(await page.locator("#panel-samples .sample").first().locator("b").innerText(), "<b>");
    await page.click("#tab-recipe");
    assert.match(await page.innerText("#panel-recipe pre"), /at_validation = true/);

    // The served model changes while the server runs.
    const served = () => [...server.log.matchAll(/serving step (\d+) of/g)].map(([, step]) => Number(step));
    await until("a later checkpoint", server, () => served().length > 0);
    await page.click("#view-chat");
    await page.reload();
    await page.waitForFunction(() => document.querySelector("#model").options.length > 0);
    const shown = Number(/step ([\d,]+)/.exec(await step())[1].replace(",", ""));
    assert.ok(shown >= served()[0], `${shown} and ${served()}`);

    training.kill("SIGINT");
    assert.equal(typeof (await training.ended), "number");
    await page.click("#view-runs");
    await page.waitForFunction(() => document.querySelector("#run-list").innerText.includes("stopped"), null, { timeout: 15_000 });
    assert.deepEqual(problems, []);
  } finally {
    await close();
  }
  server.kill("SIGTERM");
  assert.equal(await server.ended, 0, server.log);
});
