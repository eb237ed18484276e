// Questions and answers on the page. Everything the model or a user wrote goes in as text, never as markup.

export function make(tag, properties = {}, ...children) {
  const { className, text, ...attributes } = properties;
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const whole = new Intl.NumberFormat("en");
const milliseconds = (value) => (value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${Math.round(value)} ms`);

export function question(text, attachments) {
  const item = make("li", { className: "turn asked" });
  item.append(make("h3", { className: "who", text: "You" }));
  if (attachments.length) {
    item.append(make("div", { className: "media" }, ...attachments.map((each) => each.preview())));
  }
  if (text) item.append(make("p", { className: "words", text }));
  return item;
}

/** An answer that grows. */
export class Answer {
  constructor(model) {
    this.words = make("p", { className: "words" });
    this.item = make("li", { className: "turn answered", "aria-busy": "true" });
    this.item.append(make("h3", { className: "who", text: model }), this.words);
    this.text = "";
    this.item.classList.add("growing");
  }

  append(text) {
    this.text += text;
    this.words.append(text);
  }

  /** Its end: why, and what was reused. */
  end(finish, usage, mm, warnings) {
    this.item.classList.remove("growing");
    this.item.removeAttribute("aria-busy");
    if (!this.text) this.words.append(make("i", { text: "(nothing)" }));
    if (finish === "length") this.note("Cut off at the longest answer. Settings has the length.");
    if (finish === "stopped") this.note("You stopped it.");
    for (const warning of warnings ?? []) this.note(warning);
    if (usage) this.item.append(reuse(usage, mm ?? {}));
  }

  fail(error) {
    this.item.classList.remove("growing");
    this.item.removeAttribute("aria-busy");
    this.item.classList.add("failed");
    const shown = make("div", { className: "problem" }, make("p", { text: error.message }));
    const about = [error.code, error.requestId].filter(Boolean).join(" · ");
    if (about) shown.append(make("p", { className: "about", text: about }));
    this.item.append(shown);
  }

  /** Where its time went, as the server's feed tells it; whether that was news. */
  times({ begun, started, first_token: first, last_token: last }) {
    if (started === null || first === null || last === null || this.item.querySelector(".spent")) return false;
    const parts = [
      ["wait", "prepare, queue", started - begun],
      ["prefill", "prefill", first - started],
      ["decode", "decode", last - first],
    ];
    const all = last - begun || 1;
    const bar = make("div", { className: "split thin", "aria-hidden": "true" });
    const list = make("ul", { className: "legend" });
    for (const [name, title, seconds] of parts) {
      const piece = make("span", { className: name });
      piece.style.inlineSize = `${(100 * seconds) / all}%`;
      bar.append(piece);
      list.append(make("li", { className: name, text: `${title} ` }, make("b", { text: milliseconds(1000 * seconds) })));
    }
    this.item.append(make("div", { className: "spent" }, bar, list));
    return true;
  }

  note(text) {
    this.item.append(make("p", { className: "note", text }));
  }
}

/** What an answer cost and what was there already. */
function reuse(usage, mm) {
  const details = usage.prompt_tokens_details ?? {};
  const cached = details.cached_tokens;
  const media = details.media_tokens ?? 0;
  const share = (cached ?? 0) / (usage.prompt_tokens || 1);
  const facts = [
    cached == null ? ["Prompt", `${whole.format(usage.prompt_tokens)} tokens`, "prompt"] : ["Prompt", `${whole.format(cached)} of ${whole.format(usage.prompt_tokens)} tokens cached`, "cached"],
    media && ["Media", `${whole.format(media - (details.encoded_media_tokens ?? 0))} of ${whole.format(media)} tokens not encoded again`, "encoder"],
    ["Answer", `${whole.format(usage.completion_tokens)} tokens`, "answer"],
    mm.ttft_ms != null && ["First token", milliseconds(mm.ttft_ms), "ttft"],
    mm.tokens_per_second != null && ["Speed", `${whole.format(Math.round(mm.tokens_per_second))} tokens/s`, "speed"],
  ].filter(Boolean);
  const list = make("dl", { className: "facts" });
  for (const [name, value, id] of facts) {
    list.append(make("div", { "data-fact": id }, make("dt", { text: name }), make("dd", { text: value })));
  }
  if (cached == null) return make("div", { className: "reuse" }, list);
  const bar = make("div", { className: "share", role: "img", "aria-label": `${Math.round(100 * share)} % of the prompt was cached` });
  const filled = make("span");
  filled.style.inlineSize = `${100 * share}%`;
  bar.append(filled);
  return make("div", { className: "reuse" }, bar, list);
}
