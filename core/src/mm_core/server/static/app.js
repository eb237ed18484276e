// The page: what is attached and asked, and the conversation so far.

import { call, chat, key, transcribe } from "./api.js";
import { Live } from "./live.js";
import { Attachment, accepts, named, refusal } from "./media.js";
import { Answer, make, question as asked } from "./view.js";

const at = (id) => document.getElementById(id);
const THEMES = ["auto", "light", "dark"];
const state = { info: null, attachments: [], messages: [], answers: new Map(), running: null };

// -- colours ---------------------------------------------------------------------------------

function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  at("theme").textContent = `Theme: ${name}`;
  at("theme").setAttribute("aria-label", `Colours: ${name === "auto" ? "as the system" : name}`);
}

function storedTheme() {
  const name = localStorage.getItem("mm-theme");
  return THEMES.includes(name) ? name : "auto";
}

at("theme").addEventListener("click", () => {
  const name = THEMES[(THEMES.indexOf(storedTheme()) + 1) % THEMES.length];
  localStorage.setItem("mm-theme", name);
  setTheme(name);
});

// -- the server ------------------------------------------------------------------------------

const live = new Live({
  state(name) {
    const before = at("dot").dataset.state;
    at("dot").dataset.state = name;
    if (before !== name && name === "ready" && !state.info) connect();
  },
  ended(request) {
    const answer = state.answers.get(request.id);
    if (answer?.times(request) && !answer.item.nextElementSibling) reveal(answer.item);
  },
});

async function connect() {
  try {
    state.info = await (await call("/playground/info")).json();
    at("model").textContent = state.info.model;
    const kinds = named(state.info.modalities);
    at("files").accept = accepts(state.info.modalities);
    if (state.info.transcribes) {
      at("question").placeholder = "Attach a recording; names and words that occur in it help here";
      document.querySelector(".empty-title").textContent = "Let it hear something.";
    }
    at("empty-text").textContent = kinds
      ? `Drop ${kinds} anywhere on this page, paste them, or choose files below.`
      : "This model reads text only.";
    showProblem("");
  } catch (error) {
    at("model").textContent = error.status === 401 ? "locked" : "no connection";
    if (error.status === 401) {
      at("settings").open = true;
      showProblem("This server wants an API key. Put it into Settings below.");
    }
  }
}

// -- attachments -----------------------------------------------------------------------------

function attach(files) {
  const problems = [];
  for (const file of files) {
    const problem = state.info ? refusal(file, state.attachments.length, state.info) : "Not connected to the server yet.";
    if (problem) problems.push(problem);
    else state.attachments.push(new Attachment(file));
  }
  showProblem(problems.join(" "));
  showTray();
  if (state.attachments.length) say(`${state.attachments.length} attached`);
}

function showTray() {
  const items = state.attachments.map((each) => {
    const remove = make("button", { type: "button", className: "remove", "aria-label": `Remove ${each.name}`, text: "×" });
    remove.addEventListener("click", () => {
      state.attachments = state.attachments.filter((other) => other !== each);
      each.release();
      showTray();
      at("question").focus();
    });
    return make("li", {}, each.preview(), make("span", { className: "name", text: each.name }), remove);
  });
  at("tray").replaceChildren(...items);
  at("tray").hidden = !items.length;
}

at("files").addEventListener("change", () => {
  attach(at("files").files);
  at("files").value = "";
  at("question").focus();
});

document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (!files.length) return;
  event.preventDefault();
  attach(files);
});

let depth = 0; // dragenter and dragleave come for every element that is crossed
const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
const showDrop = (on) => {
  depth = on ? depth : 0;
  at("drop").hidden = !on;
};
document.addEventListener("dragenter", (event) => {
  if (!holdsFiles(event)) return;
  depth += 1;
  showDrop(true);
});
document.addEventListener("dragleave", (event) => {
  if (!holdsFiles(event)) return;
  depth -= 1;
  if (depth <= 0) showDrop(false);
});
document.addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
document.addEventListener("drop", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  showDrop(false);
  attach(event.dataTransfer.files);
  at("question").focus();
});

// -- asking ----------------------------------------------------------------------------------

function showProblem(text) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
}

/** For screen readers: beginnings and whole answers, not every token. */
function say(text) {
  at("status").textContent = text;
}

function showRunning(on) {
  at("stop").hidden = !on;
  at("ask").hidden = on;
  if (on && document.activeElement === at("ask")) at("stop").focus();
  if (!on && (document.activeElement === at("stop") || document.activeElement === document.body)) at("question").focus();
}

/** Bring an answer's end above the composer, where the user did not scroll away from it. */
let follows = true;
let seenAt = 0;
function reveal(item) {
  const room = Math.min(at("composer").getBoundingClientRect().top, innerHeight) - 12;
  if (follows && item.getBoundingClientRect().bottom > room) item.scrollIntoView({ block: "end" });
}
document.addEventListener("scroll", () => {
  if (scrollY < seenAt) follows = false;
  seenAt = scrollY;
}, { passive: true });

const settings = () => ({
  max_tokens: Math.max(1, Math.round(at("max-tokens").valueAsNumber || 256)),
  temperature: Math.min(2, Math.max(0, at("temperature").valueAsNumber || 0)),
});

async function ask() {
  const text = at("question").value.trim();
  const attachments = state.attachments;
  if (state.running || (!text && !attachments.length)) return;
  if (!state.info) await connect();
  if (!state.info) return;
  if (state.info.transcribes && attachments.length !== 1) {
    showProblem("This model writes down what it hears: attach one recording.");
    return;
  }
  showProblem("");
  state.running = new AbortController();
  state.attachments = [];
  at("question").value = "";
  fit();
  showTray();
  at("empty").hidden = true;
  const answer = new Answer(state.info.model);
  const turn = asked(text, attachments);
  at("turns").append(turn, answer.item);
  follows = true;
  const following = new ResizeObserver(() => reveal(answer.item));
  following.observe(answer.item);
  showRunning(true);
  say("Answering");
  try {
    if (state.info.transcribes) await hear(answer, text, attachments[0]);
    else await converse(answer, text, attachments);
    say(answer.text || "The answer is empty.");
  } catch (error) {
    answer.fail(error);
    say(`It failed: ${error.message}`);
    if (!at("question").value && !state.attachments.length) {
      at("question").value = text; // the question did not count: it can be sent again
      state.attachments = attachments;
      fit();
      showTray();
    }
  } finally {
    state.running = null;
    showRunning(false);
    following.disconnect();
    reveal(answer.item);
  }
}

/** Ask with all that was said before. */
async function converse(answer, text, attachments) {
  const parts = await Promise.all(attachments.map((each) => each.part()));
  const content = parts.length ? [...parts, ...(text ? [{ type: "text", text }] : [])] : text;
  const messages = [...state.messages, { role: "user", content }];
  await receive(answer, messages);
  state.messages = [...messages, { role: "assistant", content: answer.text }];
}

/** Have a recording written down. */
async function hear(answer, prompt, recording) {
  const { temperature } = settings();
  const fields = { file: recording.file, model: state.info.model, stream: "true", temperature, ...(prompt && { prompt }) };
  let [usage, warnings] = [null, []];
  let finish = null;
  try {
    for await (const event of transcribe(fields, state.running.signal)) {
      if (event.delta) answer.append(event.delta);
      if (event.usage) {
        usage = { prompt_tokens: event.usage.input_tokens, completion_tokens: event.usage.output_tokens };
        warnings = event.warnings ?? [];
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    finish = "stopped";
  }
  answer.end(finish, usage, null, warnings);
}

/** Take in an answer. What was stopped is kept as far as it came. */
async function receive(answer, messages) {
  const body = { model: state.info.model, messages, ...settings(), stream: true, stream_options: { include_usage: true } };
  let finish = null;
  let last = {};
  const warnings = [];
  try {
    for await (const chunk of chat(body, state.running.signal)) {
      state.answers.set(`req-${chunk.id?.split("-")[1]}`, answer);
      const [choice] = chunk.choices ?? [];
      if (choice?.delta?.content) answer.append(choice.delta.content);
      finish = choice?.finish_reason ?? finish;
      if (chunk.warnings) warnings.splice(0, warnings.length, ...chunk.warnings);
      if (chunk.usage) last = chunk;
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    finish = "stopped";
  }
  answer.end(finish, last.usage, last.mm, warnings);
}

function fit() {
  const field = at("question");
  field.style.blockSize = "auto";
  field.style.blockSize = `${Math.min(field.scrollHeight + 2, 240)}px`;
}

at("question").addEventListener("input", fit);
at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.running?.abort();
});
at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
at("stop").addEventListener("click", () => state.running?.abort());
at("new").addEventListener("click", () => {
  state.running?.abort();
  state.messages = [];
  state.answers.clear();
  at("turns").replaceChildren();
  at("empty").hidden = false;
  showProblem("");
  at("question").focus();
});
at("key").value = key.get();
at("key").addEventListener("change", () => {
  key.set(at("key").value.trim());
  state.info = null;
  connect();
  live.restart();
});

setTheme(storedTheme());
connect();
live.start();
at("question").focus();
