// The npm packages `openai` and `@ai-sdk/openai-compatible`, unchanged, against a server of the tiny model. Called by check_clients.py, with a
// folder that contains `node_modules`; prints one line of JSON with what came back.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import path from "node:path";

const [folder, url, key, tool] = process.argv.slice(2);
const require = createRequire(path.join(folder, "package.json"));
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { default: OpenAI } = await load("openai");
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const settings = { model, temperature: 0, max_tokens: 100 };
const ask = (content) => [{ role: "user", content }];
const found = { node: process.version };

const whole = await client.chat.completions.create({ ...settings, messages: ask("count") });
found.whole = whole.choices[0].message.content;
found.usage = whole.usage.completion_tokens;

const stream = await client.chat.completions.create({ ...settings, messages: ask("moon"), stream: true });
found.streamed = "";
for await (const chunk of stream) found.streamed += chunk.choices[0]?.delta?.content ?? "";

const completion = await client.completions.create({ ...settings, prompt: "one two", max_tokens: 4 });
found.completion = typeof completion.choices[0].text;

const called = await client.chat.completions.create({
  ...settings, messages: ask("weather"), tools: [JSON.parse(tool)], max_tokens: 250,
});
found.tool = called.choices[0].message.tool_calls?.[0]?.function;

// The client's loop over tools: it calls the function and sends the result back.
const runner = client.chat.completions.runTools({
  ...settings,
  max_tokens: 250,
  messages: ask("weather"),
  tools: [{ type: "function", function: { ...JSON.parse(tool).function, function: () => "rain", parse: JSON.parse } }],
});
found.afterTool = await runner.finalContent();

const controller = new AbortController();
const cut = await client.chat.completions.create(
  { ...settings, messages: ask("count"), stream: true, logit_bias: { 245: -100 }, max_tokens: 800 },
  { signal: controller.signal },
);
found.beforeAbort = 0;
for await (const _ of cut) if (++found.beforeAbort === 5) controller.abort();

const failed = async (call) => {
  try {
    await call();
    return "no error";
  } catch (error) {
    return `${error.constructor.name} ${error.status}`;
  }
};
found.badRequest = await failed(() => client.chat.completions.create({ ...settings, messages: ask("count"), temperature: -1 }));
found.notFound = await failed(() => client.chat.completions.create({ ...settings, model: "no-such-model", messages: ask("count") }));
const stranger = new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong", maxRetries: 0 });
found.wrongKey = await failed(() => stranger.models.list());

const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { generateText, streamText } = await load("ai");
const provider = createOpenAICompatible({ name: "moonlight", baseURL: `${url}/v1`, apiKey: key });
const sdk = { model: provider(model), temperature: 0, maxOutputTokens: 100 };
found.sdkWhole = (await generateText({ ...sdk, prompt: "count" })).text;
found.sdkStreamed = "";
for await (const piece of streamText({ ...sdk, prompt: "moon" }).textStream) found.sdkStreamed += piece;
console.log(JSON.stringify(found));
