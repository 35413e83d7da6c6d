// The page in headless Chromium: with scripted answers, which show what a model cannot be made to do on demand, and with a
// server of the program if PROGRAM is set. Run it by `test.sh`.

import assert from "node:assert/strict";
import { readFileSync, mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { openPage, PHONE, WIDE } from "./browser.mjs";
import { HOSTILE, QUESTION, startFakeServer } from "./fake_server.mjs";
import { append, lines, makeRuns } from "./make_runs.mjs";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
/** Where pictures go; none are taken without it. */
const PICTURES = process.env.PICTURES;

const home = mkdtempSync(join(tmpdir(), "moonlight-page-"));
let server;
let closed = 0;

before(async () => (server = await startFakeServer({ runs: makeRuns(join(home, "runs")) })));
after(() => {
  server.close();
  rmSync(home, { recursive: true, force: true });
});

/** Runs a test on a new page, and asserts that the page reported no problem. */
async function withPage(options, run) {
  const opened = await openPage(options.url ?? server.url + (options.hash ?? ""), options);
  try {
    await run(opened.page, opened);
    assert.deepEqual(opened.problems, []);
  } finally {
    await opened.close();
  }
}

const send = async (page, text) => {
  await page.fill("#input", text);
  // On a touch screen Enter adds a line.
  if (await page.evaluate(() => matchMedia("(pointer: coarse)").matches)) await page.click("#send");
  else await page.press("#input", "Enter");
};
const answered = (page, count = 1) =>
  page.waitForFunction((count) => document.querySelectorAll(".message.assistant .foot .icon-button").length >= count && document.querySelector("#send").ariaLabel === "Send", count);
const answers = (page) => page.locator(".message.assistant .text").allInnerTexts();
const ask = async (page, text) => {
  const before = await page.locator(".message.assistant").count();
  await send(page, text);
  await page.waitForFunction((before) => document.querySelectorAll(".message.assistant").length > before, before);
  await page.waitForFunction(() => document.querySelector("#send").ariaLabel === "Send");
};

/** Fails with each violation of WCAG 2.2 A and AA that axe finds. */
async function assertAccessible(page, what) {
  // Playwright evaluates this in the page without a script element, so the page's policy stays as it is.
  await page.evaluate(AXE);
  const violations = await page.evaluate(async () => {
    const tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];
    const { violations } = await axe.run(document, { runOnly: { type: "tag", values: tags } });
    return violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html, failureSummary }) => `${html}\n${failureSummary}`).join("\n")}`);
  });
  assert.deepEqual(violations, [], what);
}

const picture = async (page, name) => {
  if (!PICTURES) return;
  mkdirSync(PICTURES, { recursive: true });
  await page.screenshot({ path: join(PICTURES, `serve-${name}.png`) });
};

const overflow = (page) =>
  page.evaluate(() => {
    const wide = [...document.querySelectorAll("body *")].filter((element) => {
      const box = element.getBoundingClientRect();
      // Code and curves scroll in their own boxes; a closed menu is outside on purpose.
      return box.width > 0 && (box.right > innerWidth + 1 || box.left < -1) && !element.closest("pre, .side, .hidden, .skip");
    });
    return [document.documentElement.scrollWidth - innerWidth, ...wide.map((element) => element.outerHTML.slice(0, 120))];
  });

describe("chat", () => {
  test("an answer streams in and has its usage", () =>
    withPage({}, async (page) => {
      await send(page, "slow");
      await page.waitForFunction(() => document.querySelector(".message.assistant .text")?.innerText.length > 20);
      assert.equal(await page.getAttribute("#send", "aria-label"), "Stop");
      const early = (await answers(page))[0].length;
      await page.waitForFunction((early) => document.querySelector(".message.assistant .text").innerText.length > early + 20, early);
      await page.click("#send");
      await answered(page);
      await ask(page, "hello");
      assert.equal((await answers(page))[1], "You said: hello");
      assert.match(await page.locator(".usage").nth(1).innerText(), /^\d+ tokens · [\d.,]+ tokens\/s · first after [\d.]+ s$/);
      const { body } = server.state.requests.at(-1);
      assert.equal(body.stream, true);
      assert.deepEqual(body.messages.map(({ role }) => role), ["user", "assistant", "user"]);
      assert.equal("seed" in body || "top_k" in body, false);
    }));

  test("Escape stops, and the server sees the connection close", () =>
    withPage({}, async (page) => {
      const closedBefore = server.state.closed;
      await send(page, "slow");
      await page.waitForFunction(() => document.querySelector(".message.assistant .text")?.innerText.length > 20);
      await page.keyboard.press("Escape");
      await answered(page);
      assert.match(await page.locator(".usage").innerText(), /stopped$/);
      const text = (await answers(page))[0];
      await page.waitForTimeout(150);
      assert.equal((await answers(page))[0], text);
      assert.equal(server.state.closed, closedBefore + 1);
      assert.equal(await page.evaluate(() => document.activeElement.id), "input");
    }));

  test("output is text and never becomes an element", () =>
    withPage({}, async (page) => {
      await send(page, "html");
      await answered(page);
      await page.waitForTimeout(200);
      const found = await page.evaluate(() => {
        const message = document.querySelector(".message.assistant .text");
        const tags = [...message.querySelectorAll("*")].map(({ localName }) => localName);
        const icons = ["svg", "use"]; // of the copy button
        return { tags: [...new Set(tags)].filter((tag) => !icons.includes(tag)).sort(), hacked: window.hacked ?? null, text: message.innerText };
      });
      assert.deepEqual(found.tags, ["button", "code", "div", "p", "pre", "span", "strong"]);
      assert.equal(found.hacked, null);
      for (const line of HOSTILE.replace(/\*\*|`/g, "").split("\n").filter((line) => line && line !== "html")) assert.ok(found.text.includes(line), line);
      assert.equal(await page.locator("img, iframe, script:not([src]), .message a").count(), 0);
      // A user's message and titles are no different.
      await ask(page, `<img src=x onerror="window.hacked = 1">`);
      await page.click("#new-chat");
      await ask(page, `<b>title</b>`);
      assert.equal(await page.locator("img, #conversations b, #chat-title b").count(), 0);
      assert.equal(await page.evaluate(() => window.hacked ?? null), null);
    }));

  test("code and bold are marked, and marks without a partner stay", () =>
    withPage({}, async (page) => {
      await ask(page, "inline");
      const of = (tag) => page.locator(`.message.assistant .text ${tag}`).allInnerTexts();
      assert.deepEqual(await of("code"), ["a", "b", "c`d", "e f"]);
      assert.deepEqual(await of("strong"), ["x", "y z"]);
      assert.match((await answers(page))[0], /; `open and \*\*open\.$/);
    }));

  test("inline scripts are refused by the policy", () =>
    withPage({}, async (page) => {
      const ran = await page.evaluate(async () => {
        const script = document.createElement("script");
        script.textContent = "window.hacked = 1";
        document.body.append(script);
        await new Promise((resolve) => setTimeout(resolve, 100));
        return window.hacked ?? null;
      });
      assert.equal(ran, null);
    }).catch((error) => assert.match(String(error), /Content Security Policy/)));

  test("a reload keeps conversations, and they can be renamed, deleted and restored", () =>
    withPage({}, async (page) => {
      await ask(page, "first question");
      await page.click("#new-chat");
      await ask(page, "second question");
      await page.reload();
      await page.waitForFunction(() => document.querySelectorAll("#conversations li").length === 2);
      assert.deepEqual(await answers(page), ["You said: second question"]);
      await page.locator("#conversations .open").nth(1).click();
      assert.deepEqual(await answers(page), ["You said: first question"]);
      await page.getByRole("button", { name: "Rename “first question”" }).click();
      await page.fill("#rename-input", "Renamed");
      await page.keyboard.press("Enter");
      assert.equal(await page.innerText("#chat-title"), "Renamed");
      await page.getByRole("button", { name: "Delete “Renamed”" }).click();
      assert.equal(await page.locator("#conversations li").count(), 1);
      await page.getByRole("button", { name: "Undo" }).click();
      assert.equal(await page.locator("#conversations li").count(), 2);
      await page.reload();
      await page.waitForFunction(() => document.querySelectorAll("#conversations li").length === 2);
    }));

  test("conversations are exported and imported", () =>
    withPage({}, async (page) => {
      await ask(page, "to be exported");
      await page.click("#settings-open");
      const [download] = await Promise.all([page.waitForEvent("download"), page.click("#export")]);
      const path = join(home, "export.json");
      await download.saveAs(path);
      const exported = JSON.parse(readFileSync(path, "utf8"));
      assert.equal(exported.conversations[0].messages[0].content, "to be exported");
      await page.setInputFiles("#import-file", path);
      await page.waitForFunction(() => document.querySelectorAll("#conversations li").length === 2);
      for (const [text, expected] of [["{", "The file is not JSON"], ["[]", "The file has no conversations"], [`{"messages": [{"role": "x"}]}`, "The file has no conversations"]]) {
        await page.setInputFiles("#import-file", { name: "a.json", mimeType: "application/json", buffer: Buffer.from(text) });
        await page.waitForFunction((expected) => document.querySelector("#toast-text").textContent === expected, expected);
      }
      assert.equal(await page.locator("#conversations li").count(), 2);
    }));

  test("a message is edited and an answer is written again", () =>
    withPage({}, async (page) => {
      await ask(page, "one");
      await ask(page, "two");
      await page.getByRole("button", { name: "Write the answer again" }).click();
      await answered(page, 2);
      assert.deepEqual(server.state.requests.at(-1).body.messages.map(({ content }) => content), ["one", "You said: one", "two"]);
      await page.locator(".message.user").first().hover();
      await page.getByRole("button", { name: "Edit the message" }).first().click();
      await page.keyboard.press("ControlOrMeta+A");
      await page.keyboard.type("three");
      await page.keyboard.press("Enter");
      await page.waitForFunction(() => document.querySelector("#send").ariaLabel === "Send" && document.querySelector(".message.assistant .text")?.innerText === "You said: three");
      assert.deepEqual(await answers(page), ["You said: three"]);
      // A message that is edited while its answer is written gets another answer.
      await send(page, "slow");
      await page.waitForFunction(() => document.querySelectorAll(".message.assistant .text")[1]?.innerText.length > 10);
      await page.locator(".message.user").nth(1).hover();
      await page.getByRole("button", { name: "Edit the message" }).nth(1).click();
      await page.keyboard.press("ControlOrMeta+A");
      await page.keyboard.type("four");
      await page.keyboard.press("Enter");
      await page.waitForFunction(() => document.querySelector("#send").ariaLabel === "Send" && document.querySelectorAll(".message.assistant .text")[1]?.innerText === "You said: four");
      await page.getByRole("button", { name: "Edit the message" }).nth(1).click();
      await page.keyboard.press("ControlOrMeta+A");
      await page.keyboard.type("three");
      await page.keyboard.press("Enter");
      await page.waitForFunction(() => document.querySelectorAll(".message.assistant .text")[1]?.innerText === "You said: three");
      // The arrow key edits the last message, and Escape leaves it as it is.
      await page.focus("#input");
      await page.keyboard.press("ArrowUp");
      assert.equal(await page.locator(".editing textarea").inputValue(), "three");
      await page.keyboard.press("Escape");
      assert.deepEqual(await answers(page), ["You said: three", "You said: three"]);
    }));

  test("errors are shown where they happen, and can be tried again", () =>
    withPage({}, async (page) => {
      await ask(page, "busy");
      assert.equal(await page.locator(".error span").innerText(), "the queue is full (32 requests); try again later");
      await page.click("#new-chat");
      await ask(page, "midway");
      assert.deepEqual(await answers(page), ["One. Two."]);
      assert.equal(await page.locator(".error span").innerText(), "the request took longer than 600 s");
      await page.click("#new-chat");
      await ask(page, "cut");
      assert.match((await answers(page))[0], /^One\./);
      assert.equal(await page.locator(".error").count(), 1);
      const requests = server.state.requests.length;
      await page.click(".error button");
      await page.waitForFunction(() => document.querySelector("#send").ariaLabel === "Send");
      assert.equal(server.state.requests.length, requests + 1);
      await page.click("#new-chat");
      await ask(page, "empty");
      assert.equal(await page.locator(".usage").innerText(), "The answer is empty");
      await page.reload();
      await page.waitForFunction(() => document.querySelectorAll("#conversations li").length >= 3);
      await page.getByRole("button", { name: "busy", exact: true }).click();
      assert.equal(await page.locator(".error").count(), 1, "an error outlives a reload");
    }));

  test("a model without a chat template continues the text", () =>
    withPage({}, async (page) => {
      await page.selectOption("#model", "base");
      await ask(page, "Once upon a time");
      assert.deepEqual(await answers(page), [" and so on"]);
      assert.deepEqual([server.state.requests.at(-1).path, server.state.requests.at(-1).body.prompt], ["/v1/completions", "Once upon a time"]);
      await ask(page, "Then");
      assert.equal(server.state.requests.at(-1).body.prompt, "Once upon a time and so on\nThen");
    }));

  test("a training that is served shows its step", () =>
    withPage({}, async (page) => {
      assert.deepEqual(await page.locator("#model option").allInnerTexts(), ["moonlight-tiny", "base", "demo, step 100"]);
      await page.selectOption("#model", "demo");
      await ask(page, "hi");
      assert.equal(server.state.requests.at(-1).body.model, "demo");
    }));

  test("sampling and the system prompt reach the server, and invalid values do not", () =>
    withPage({}, async (page) => {
      await page.click("#settings-open");
      await page.fill("#system", "Be brief.");
      await page.fill("#temperature", "0.3");
      await page.fill("#top-k", "40");
      await page.fill("#seed", "7");
      await page.fill("#max-tokens", "5");
      await page.fill("#max-tokens", "-3");
      await ask(page, "long words come here");
      const { body } = server.state.requests.at(-1);
      assert.deepEqual([body.temperature, body.top_p, body.top_k, body.seed, body.max_tokens], [0.3, 0.95, 40, 7, 5]);
      assert.deepEqual(body.messages[0], { role: "system", content: "Be brief." });
      assert.match(await page.locator(".usage").innerText(), /ended at the longest answer$/);
      assert.equal(await page.inputValue("#max-tokens"), "5");
      await page.reload();
      await page.waitForFunction(() => document.querySelector("#seed").value === "7");
      assert.equal(await page.inputValue("#system"), "Be brief.");
      await page.click("#settings-open");
      await page.click("#reset");
      await page.fill("#seed", "");
      await ask(page, "x");
      assert.equal("seed" in server.state.requests.at(-1).body, false);
    }));

  test("an API key is asked for and kept for the tab only", async () => {
    const guarded = await startFakeServer({ key: "secret" });
    try {
      await withPage({ url: guarded.url }, async (page, { context }) => {
        await page.waitForFunction(() => document.activeElement.id === "key");
        assert.equal(await page.innerText("#notice-text"), "The server asks for an API key");
        await page.fill("#key", "secret");
        await page.press("#key", "Enter");
        await page.waitForFunction(() => document.querySelector("#notice").hidden);
        await ask(page, "hello");
        assert.deepEqual(await answers(page), ["You said: hello"]);
        const stored = await page.evaluate(() => JSON.stringify({ ...localStorage }));
        assert.equal(stored.includes("secret"), false);
        await page.reload();
        await page.waitForFunction(() => document.querySelector("#model").options.length > 0);
        const other = await context.newPage();
        await other.goto(guarded.url);
        await other.waitForFunction(() => !document.querySelector("#notice").hidden);
      });
    } finally {
      guarded.close();
    }
  });

  test("storage that is full loses the oldest conversations, and says so", () =>
    withPage({}, async (page) => {
      await page.evaluate(() => {
        const conversation = (index) => ({ id: `abc${index}`, title: `old ${index}`, system: "", created: index, updated: index, messages: [{ role: "user", content: "x".repeat(600_000) }] });
        for (let index = 1; index <= 6; index++) localStorage.setItem(`moonlight.conversation.abc${index}`, JSON.stringify(conversation(index)));
      });
      await page.reload();
      await page.waitForFunction(() => document.querySelectorAll("#conversations li").length === 6);
      await page.click("#new-chat");
      await ask(page, "y".repeat(700_000));
      await page.waitForFunction(() => document.querySelector("#toast-text").textContent.startsWith("Storage is full: removed the oldest, “old 1”"));
      const kept = await page.evaluate(() => Object.keys(localStorage).filter((key) => key.startsWith("moonlight.conversation.")).length);
      assert.ok(kept < 7 && kept > 2, String(kept));
    }));

  test("damaged storage does not break the page", () =>
    withPage({}, async (page) => {
      await page.evaluate(() => {
        localStorage.setItem("moonlight.conversation.aaaa", "{");
        localStorage.setItem("moonlight.conversation.bbbb", `{"messages": [null, {"role": "user", "content": 3}], "title": {}}`);
        localStorage.setItem("moonlight.options", "[1,");
        localStorage.setItem("moonlight.theme", "__proto__");
      });
      await page.reload();
      await page.waitForFunction(() => document.querySelector("#model").options.length > 0);
      await ask(page, "works");
      assert.deepEqual(await answers(page), ["You said: works"]);
    }));
});

describe("access", () => {
  test("everything is reached by the keyboard alone", () =>
    withPage({}, async (page) => {
      const press = (key) => page.keyboard.press(key);
      const focus = () => page.evaluate(() => document.activeElement.id || document.activeElement.getAttribute("aria-label") || document.activeElement.textContent.trim());
      const order = [];
      await page.focus("#skip");
      for (let index = 0; index < 9; index++) {
        if (index > 0) await press("Tab");
        order.push(await focus());
        const ring = await page.evaluate(() => {
          const style = getComputedStyle(document.activeElement);
          const field = getComputedStyle(document.activeElement.parentElement);
          return style.outlineStyle !== "none" || field.boxShadow !== "none";
        });
        assert.ok(ring, `${order.at(-1)} shows its focus`);
      }
      assert.deepEqual(order, ["skip", "view-chat", "view-runs", "new-chat", "theme", "model", "settings-open", "thread", "input"]);
      await page.keyboard.type("by keyboard");
      await press("Shift+Enter");
      await page.keyboard.type("second line");
      await press("Enter");
      await answered(page);
      assert.deepEqual(server.state.requests.at(-1).body.messages.at(-1).content, "by keyboard\nsecond line");
      // Settings open and close, and the focus returns.
      await page.focus("#settings-open");
      await press("Enter");
      assert.equal(await focus(), "settings-close");
      await press("Escape");
      assert.equal(await focus(), "settings-open");
      // The other view, and back.
      await page.focus("#view-runs");
      await press("Enter");
      await page.waitForSelector(".chart:not([hidden])");
      await page.focus(".chart.main .plot");
      await press("ArrowLeft");
      const place = await page.locator(".chart.main .readout span").first().innerText();
      assert.match(place, /^step \d/);
      await press("ArrowLeft");
      assert.notEqual(await page.locator(".chart.main .readout span").first().innerText(), place);
      await page.focus("#tab-samples");
      await press("ArrowRight");
      assert.equal(await focus(), "tab-recipe");
      assert.equal(await page.isVisible("#panel-recipe"), true);
    }));

  test("a screen reader hears the answer in sentences", () =>
    withPage({}, async (page) => {
      await ask(page, "long");
      const spoken = await page.locator("#spoken p").allTextContents();
      assert.ok(spoken.length > 4, String(spoken.length));
      assert.match(spoken[0], /^A learning rate is the size of a step\./);
      assert.equal(spoken.at(-1), "End of the answer");
      assert.equal(await page.getAttribute("#spoken", "aria-live"), "polite");
    }));

  for (const [name, options] of [["light", { colorScheme: "light" }], ["dark", { colorScheme: "dark" }], ["narrow", { ...PHONE, colorScheme: "light" }]]) {
    test(`axe finds nothing, and nothing is too wide (${name})`, () =>
      withPage(options, async (page) => {
        await assertAccessible(page, "empty");
        await ask(page, "What is Muon?");
        if (name === "narrow") await page.getByRole("button", { name: "Open the menu" }).click();
        await page.click("#new-chat");
        await ask(page, QUESTION);
        await page.mouse.move(0, 0);
        await assertAccessible(page, "chat");
        assert.deepEqual(await overflow(page), [0]);
        await picture(page, `chat-${name}`);
        await ask(page, "busy");
        await page.click("#settings-open");
        await page.waitForTimeout(50);
        await assertAccessible(page, "settings and an error");
        assert.equal((await overflow(page))[0], 0);
        await page.keyboard.press("Escape");
        if (name === "narrow") {
          await page.getByRole("button", { name: "Open the menu" }).click();
          assert.equal(await page.evaluate(() => document.querySelector("#main").inert), true);
          await assertAccessible(page, "menu");
          const small = await page.evaluate(() => [...document.querySelectorAll("#side button, #side a")].filter((target) => target.getBoundingClientRect().height < 43).map((target) => target.id || target.className));
          assert.deepEqual(small, [], "touch targets");
          await page.click("#view-runs");
        } else await page.click("#view-runs");
        await page.waitForSelector(".chart:not([hidden])");
        await page.evaluate(() => document.querySelectorAll(".run input").forEach((box) => box.checked || box.click()));
        await page.waitForFunction(() => document.querySelectorAll(".chart.main path.curve").length >= 6);
        await page.fill("#smoothing", "0.8");
        await page.mouse.move(0, 0);
        await page.waitForTimeout(200);
        await assertAccessible(page, "runs");
        assert.deepEqual(await overflow(page), [0]);
        await picture(page, `runs-${name}`);
        await page.click("#tab-recipe");
        await page.waitForSelector("#panel-recipe pre");
        await assertAccessible(page, "recipe");
      }));
  }

  test("the theme follows the system until it is chosen", () =>
    withPage({ colorScheme: "dark" }, async (page) => {
      const background = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
      const dark = await background();
      await page.emulateMedia({ colorScheme: "light" });
      const light = await background();
      assert.notEqual(dark, light);
      await page.click("#theme");
      assert.equal(await background(), light);
      await page.click("#theme");
      assert.equal(await background(), dark);
      await page.reload();
      assert.equal(await background(), dark);
      await page.click("#theme");
      assert.equal(await page.innerText("#theme-name"), "System theme");
      assert.equal(await background(), light);
    }));

  test("reduced motion is respected", () =>
    withPage({}, async (page) => {
      await send(page, "slow");
      const moving = await page.evaluate(() => document.getAnimations().length);
      assert.equal(moving, 0);
      await page.keyboard.press("Escape");
    }));
});

describe("runs", () => {
  test("curves grow while lines are appended", () =>
    withPage({ hash: "#runs" }, async (page) => {
      await page.waitForSelector(".chart:not([hidden])");
      await page.getByRole("checkbox", { name: /^warm-up/ }).check();
      await page.getByRole("checkbox", { name: /^adamw/ }).uncheck();
      const last = () => page.locator(".chart.main .plot").getAttribute("aria-label");
      await page.waitForFunction(() => document.querySelector(".chart.main .plot").ariaLabel.includes("warm-up"));
      assert.match(await last(), /warm-up: [\d.]+ at step 180/);
      append(join(home, "runs"), "warm-up", lines(181, 185, { seed: 3, floor: 2.05, speed: 0.013 }) + `{"split":"tr`);
      await page.waitForFunction(() => document.querySelector(".chart.main .plot").ariaLabel.includes("at step 185"), null, { timeout: 8000 });
      append(join(home, "runs"), "warm-up", `ain","step":186,"loss":2.5}\n\u0000garbage\n[1]\n`);
      await page.waitForFunction(() => document.querySelector(".chart.main .plot").ariaLabel.includes("at step 186"), null, { timeout: 8000 });
      await page.waitForFunction(() => document.querySelector("#run-list").innerText.includes("186/400"), null, { timeout: 12_000 });
      assert.equal(await page.innerText("#live"), "live");
      assert.equal(await page.innerText("#curves-note"), "warm-up: 2 damaged lines are ignored");
    }));

  test("axes, samples and the recipe are shown as text", () =>
    withPage({ hash: "#runs" }, async (page) => {
      await page.waitForSelector(".chart:not([hidden])");
      await page.getByRole("checkbox", { name: /^muon/ }).check();
      await page.waitForFunction(() => document.querySelector("#panel-samples").innerText.includes("Step 400"));
      assert.match(await page.innerText("#panel-samples"), /Result<Self, Error>/);
      assert.equal(await page.locator("#panel-samples self").count(), 0);
      await page.click("#tab-recipe");
      assert.match(await page.innerText("#panel-recipe pre"), /learning_rate = 0.002/);
      const path = () => page.locator(".chart.main path.curve").first().getAttribute("d");
      const linear = await path();
      await page.selectOption("#scale", "log");
      assert.notEqual(await path(), linear);
      await page.selectOption("#axis", "tokens");
      assert.match(await page.locator(".chart.main .plot").getAttribute("aria-label"), /at tokens 1,638,400/);
      await page.selectOption("#axis", "seconds");
      await page.fill("#smoothing", "0.9");
      assert.ok((await page.locator(".chart.main path.pale").count()) >= 1);
      await page.reload();
      await page.waitForFunction(() => document.querySelector("#scale").value === "log");
    }));

  test("a server without runs says so", async () => {
    const bare = await startFakeServer();
    try {
      await withPage({ url: `${bare.url}/#runs` }, async (page) => {
        await page.waitForFunction(() => document.querySelector("#runs-empty-title").innerText === "This server shows no runs");
      });
    } finally {
      bare.close();
    }
  });
});
