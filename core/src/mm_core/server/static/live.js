// The engine now: a sample twice a second, kept for a minute, drawn as SVG. Colours come from the style sheet.

import { call, events } from "./api.js";

const SPAN = 60; // seconds that the charts show
const LANES = 30; // seconds that the requests' lanes show
const SVG = "http://www.w3.org/2000/svg";
const WAITS = { read: 1, fetch: 1, queue: 1, prepare: 1 };
const at = (id) => document.getElementById(id);
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

function draw(tag, className, attributes) {
  const made = document.createElementNS(SVG, tag);
  made.setAttribute("class", className);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Smallest of 1, 2, 5, 10, … that is not below value. */
function roof(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 2, 5, 10].map((each) => each * power).find((each) => each >= value) ?? 1;
}

export class Live {
  /** told: `state` hears how the engine is, `ended` of each request that ended. */
  constructor(told) {
    this.samples = [];
    this.requests = new Map();
    this.told = told;
    this.running = null;
    this.wait = 1000;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.stop() : this.start()));
  }

  start() {
    if (this.running || document.hidden) return;
    this.running = new AbortController();
    this.follow(this.running);
  }

  stop() {
    this.running?.abort();
    this.running = null;
  }

  /** Begin again, as with another key. */
  restart() {
    this.stop();
    this.wait = 1000;
    this.start();
  }

  async follow(own) {
    while (!own.signal.aborted) {
      try {
        const reply = await call("/playground/live", { signal: own.signal });
        this.wait = 1000;
        for await (const data of events(reply)) this.take(JSON.parse(data));
      } catch (error) {
        if (own.signal.aborted) return;
        const text = error.status === 401 ? "needs an API key: see Settings" : "no connection, trying again";
        this.tell(error.status === 401 ? "locked" : "dead", text);
        if (error.status === 401) return;
      }
      await new Promise((resolve) => setTimeout(resolve, this.wait));
      this.wait = Math.min(2 * this.wait, 15000);
    }
  }

  tell(state, text) {
    if (at("live-state").textContent !== text) at("live-state").textContent = text;
    this.told.state(state);
  }

  take(sample) {
    const last = this.samples.at(-1);
    if (last && sample.now < last.now) this.samples = []; // another server
    this.samples.push(sample);
    this.samples = this.samples.filter((each) => each.now >= sample.now - SPAN - 2);
    for (const each of sample.ended) {
      this.requests.set(`${each.id} ${each.ended}`, each);
      this.told.ended(each);
    }
    for (const [id, each] of this.requests) if (each.ended < sample.now - LANES) this.requests.delete(id);
    this.tell(sample.state, sample.state === "ready" ? "live" : `the engine is ${sample.state}`);
    this.show(sample);
  }

  show(sample) {
    const rates = this.rates();
    const recent = rates.slice(-4).map((each) => each.value);
    const rate = recent.length ? recent.reduce((sum, each) => sum + each, 0) / recent.length : 0;
    at("running").textContent = sample.running;
    at("waiting").textContent = sample.waiting;
    at("rate").textContent = rate < 10 ? rate.toFixed(1) : compact.format(Math.round(rate));
    at("kv").textContent = `${(100 * sample.kv_usage).toFixed(sample.kv_usage < 0.1 ? 1 : 0)} %`;
    const top = roof(Math.max(...rates.map((each) => each.value), 1));
    at("rate-top").textContent = `top ${compact.format(top)}`;
    this.area("rate-chart", 120, top, [["decode", rates]], sample.now);
    const counts = (name) => this.samples.map((each) => ({ when: each.now, value: each[name] }));
    const both = this.samples.map((each) => ({ when: each.now, value: each.running + each.waiting }));
    const most = roof(Math.max(...both.map((each) => each.value), 1));
    at("batch-top").textContent = `top ${most}`;
    this.area("batch-chart", 80, most, [["wait", both], ["prefill", counts("running")]], sample.now);
    this.lanes(sample);
    this.levels(sample);
  }

  /** Tokens a second between two samples each. */
  rates() {
    const found = [];
    for (let i = 1; i < this.samples.length; i += 1) {
      const [a, b] = [this.samples[i - 1], this.samples[i]];
      const seconds = Math.max(b.now - a.now, 0.1);
      found.push({ when: b.now, value: Math.max(b.generation_tokens - a.generation_tokens, 0) / seconds });
    }
    return found;
  }

  area(id, height, top, series, now) {
    const x = (when) => (600 * (1 - (now - when) / SPAN)).toFixed(1);
    const y = (value) => (height - 1 - (height - 6) * Math.min(value / top, 1)).toFixed(1);
    const marks = [0.5, 1].map((part) => draw("path", "grid", { d: `M0 ${y(top * part)}H600` }));
    const shapes = series.flatMap(([name, points]) => {
      if (points.length < 2) return [];
      const line = points.map((each) => `${x(each.when)} ${y(each.value)}`).join("L");
      const floor = `${x(points.at(-1).when)} ${height}L${x(points[0].when)} ${height}`;
      return [draw("path", `fill ${name}`, { d: `M${line}L${floor}Z` }), draw("path", `line ${name}`, { d: `M${line}` })];
    });
    at(id).replaceChildren(...marks, ...shapes);
  }

  /** A bar a request, in the first lane that is free. */
  lanes(sample) {
    const open = sample.calls.map((each) => ({ ...each, open: true, ended: sample.now }));
    const all = [...this.requests.values(), ...open].sort((a, b) => a.begun - b.begun);
    const ends = [];
    const placed = all.map((each) => {
      let lane = ends.findIndex((end) => end < each.begun - 0.2);
      if (lane < 0) lane = ends.length;
      ends[lane] = each.ended;
      return [each, lane];
    });
    const rows = Math.max(ends.length, 6);
    const step = 120 / rows;
    const x = (when) => 600 * (1 - Math.min(sample.now - when, LANES) / LANES);
    const bars = placed.flatMap(([each, lane]) =>
      parts(each).map(([name, from, to]) =>
        draw("rect", `bar ${name}`, {
          x: x(from).toFixed(1), y: (lane * step + step * 0.15).toFixed(1),
          width: Math.max(x(to) - x(from), 1.5).toFixed(1), height: (step * 0.7).toFixed(1),
        }),
      ),
    );
    at("lanes").replaceChildren(draw("path", "grid", { d: "M0 119.5H600" }), ...bars);
    at("lanes").setAttribute("aria-label", `Your requests: ${open.length} on their way, ${this.requests.size} ended in the last 30 seconds`);
  }

  levels(sample) {
    const first = this.samples[0];
    const grown = (level) => Math.max(sample.cached_tokens[level] - first.cached_tokens[level], 0);
    const found = { device: grown("device"), host: grown("host"), disk: grown("disk") };
    const prompt = Math.max(sample.prompt_tokens - first.prompt_tokens, 0);
    found.computed = Math.max(prompt - found.device - found.host - found.disk, 0);
    const bars = Object.entries(found).filter(([, count]) => count).map(([name, count]) => {
      const bar = document.createElement("span");
      bar.className = name;
      bar.style.inlineSize = `${(100 * count) / prompt}%`;
      return bar;
    });
    at("levels").replaceChildren(...bars);
    const told = Object.entries(found).map(([name, count]) => `${count} ${name}`).join(", ");
    at("levels").setAttribute("aria-label", prompt ? `Prompt tokens: ${told}` : "No prompts in the last minute");
    for (const [name, count] of Object.entries(found)) at(`from-${name}`).textContent = compact.format(count);
  }
}

/** Of a request: what it was at, from when, until when. */
function parts(each) {
  if (each.open) {
    const name = WAITS[each.phase] ? "wait" : each.phase;
    return [[`${name} open`, each.begun, each.ended]];
  }
  const began = each.started ?? each.ready ?? each.first_token ?? each.ended;
  const first = each.first_token ?? each.ended;
  const last = each.last_token ?? each.ended;
  return [["wait", each.begun, began], ["prefill", began, first], ["decode", first, last]].filter(([, a, b]) => b > a);
}
