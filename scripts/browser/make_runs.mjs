// Folders of runs with plausible metrics, for the test of the page.

import { mkdirSync, writeFileSync, appendFileSync } from "node:fs";
import { join } from "node:path";

/** Numbers from 0 to 1 that are the same each time (mulberry32). */
function random(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

/** The lines of `metrics.jsonl` from one step to another. */
export function lines(from, to, { seed = 1, floor = 2.1, speed = 0.011, steps = 400 } = {}) {
  const found = [];
  for (let step = from; step <= to; step++) {
    const next = random(seed * 100_003 + step);
    next();
    const noise = () => next() + next() - 1;
    const loss = floor + (5.4 - floor) * Math.exp(-speed * step) + 0.08 * noise();
    const record = {
      split: "train",
      step,
      tokens: step * 4096,
      loss,
      perplexity: Math.exp(loss),
      lr: step < 20 ? (2e-3 * step) / 20 : 2e-4 + 9e-4 * (1 + Math.cos((Math.PI * (step - 20)) / (steps - 20))),
      grad_norm: 0.9 + 2.2 * Math.exp(-step / 25) + 0.25 * noise(),
      tokens_per_second: 1450 + 90 * noise(),
      memory_mib: 355 + 4 * noise(),
      expert_imbalance: 1.6 + 3.4 * Math.exp(-step / 60) + 0.3 * noise(),
      dead_experts: Math.max(0, Math.round(5 * Math.exp(-step / 30) + 0.6 * noise())),
    };
    if (step % 50 === 0) Object.assign(record, { max_attention_logit: 2.5 + step / 300, update_rms_muon: 0.18, update_rms_adamw: 0.3 });
    found.push(JSON.stringify(record));
    if (step % 50 === 0) {
      const valid = floor + 0.12 + (5.4 - floor) * Math.exp(-speed * step);
      found.push(JSON.stringify({ split: "valid", step, tokens: step * 4096, loss: valid, perplexity: Math.exp(valid) }));
    }
  }
  return found.join("\n") + "\n";
}

const recipe = (name, steps) => `[run]
name = "${name}"
dir = "runs"
seed = 0
device = "auto"

[model]
preset = "quickstart"
dtype = "auto"

[data]
train = ["moonlight-*/src/**/*.rs"]
valid_fraction = 0.05
format = "text"
tokenizer = "bytes"
sequence_length = 256

[optimizer]
name = "muon"
learning_rate = 0.002
weight_decay = 0.1

[train]
steps = ${steps}
batch_size = 8
gradient_accumulation = 2
validate_every = 50
checkpoint_every = 100

[sample]
prompt = "pub fn "
max_new_tokens = 120
at_validation = true
`;

const SAMPLES = [
  "te te te(se  the;\n    (self, elet selt) -> e",
  "read_st(&self, path: &str) -> Result<Strin> {\n    let mut text = String::new();\n",
  "load(path: &Path) -> Result<Self, Error> {\n    let file = File::open(path)?;\n    let text = read(&file)?;\n    Ok(Self { text })\n}\n",
];

/** Makes a folder with a finished, a running and a hostile run. */
export function makeRuns(folder) {
  for (const [name, last, options] of [
    ["muon", 400, { seed: 1 }],
    ["adamw", 400, { seed: 2, floor: 2.35, speed: 0.008 }],
    ["warm-up", 180, { seed: 3, floor: 2.05, speed: 0.013 }],
  ]) {
    const run = join(folder, name);
    mkdirSync(run, { recursive: true });
    writeFileSync(join(run, "recipe.toml"), recipe(name, 400));
    writeFileSync(join(run, "metrics.jsonl"), lines(1, last, options));
    const texts = SAMPLES.slice(0, last >= 400 ? 3 : 2);
    writeFileSync(join(run, "samples.jsonl"), texts.map((text, index) => JSON.stringify({ step: [50, 200, 400][index], prompt: "pub fn ", text }) + "\n").join(""));
  }
  return folder;
}

export const append = (folder, name, text) => appendFileSync(join(folder, name, "metrics.jsonl"), text);
