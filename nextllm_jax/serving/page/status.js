// The status page: reads /ready and /metrics every two seconds.

import { element } from "./markdown.js";
import { parseMetrics, quantile } from "./metrics.js";

const EVERY_MS = 2000;
const TIMEOUT_MS = 5000;
const RATE_SAMPLES = 6; // rates are over the last ten seconds

const state = document.getElementById("state");
const models = document.getElementById("models");
const samples = [];

async function get(path) {
  return fetch(path, { signal: AbortSignal.timeout(TIMEOUT_MS) });
}

async function update() {
  try {
    const [ready, response] = await Promise.all([get("/ready"), get("/metrics")]);
    if (!response.ok) throw new Error(`status ${response.status}`);
    samples.push({ seconds: performance.now() / 1000, metrics: parseMetrics(await response.text()) });
    if (samples.length > RATE_SAMPLES) samples.shift();
    draw();
    say(ready.ok ? "The server is ready." : "The server takes no new requests.", ready.ok);
  } catch (error) {
    samples.length = 0;
    say(`The server does not answer (${error.message}). The numbers are its last ones.`, false);
  }
  setTimeout(update, EVERY_MS);
}

function say(text, isGood) {
  if (state.textContent !== text) state.textContent = text;
  state.classList.toggle("error", !isGood);
}

function draw() {
  const names = samples.at(-1).metrics.filter(({ name }) => name === "nextllm_slots").map(({ labels }) => labels.model);
  models.replaceChildren(...names.map(section));
}

function section(model) {
  const values = (name, of = samples.at(-1)) =>
    of.metrics.filter((each) => each.name === `nextllm_${name}` && each.labels.model === model);
  const value = (name, of) => values(name, of)[0]?.value ?? 0;
  const rate = (name) => {
    const [first, last] = [samples[0], samples.at(-1)];
    return last === first ? 0 : Math.max(0, value(name, last) - value(name, first)) / (last.seconds - first.seconds);
  };
  const wait = values("time_to_first_token_seconds_bucket");
  const rows = [
    ["Slots used", `${value("slots_used")} of ${value("slots")}`],
    ["Rows in the queue", value("waiting_rows")],
    ["Cache used", `${(100 * value("cache_used_ratio")).toFixed(0)} %`],
    ["New tokens/s", rate("new_tokens_total").toFixed(1)],
    ["Prompt tokens/s", rate("prompt_tokens_read_total").toFixed(1)],
    ["New tokens since the start", value("new_tokens_total").toLocaleString("en")],
    ["Time to first token, median", seconds(quantile(wait, 0.5))],
    ["Time to first token, 95 %", seconds(quantile(wait, 0.95))],
  ];
  const items = rows.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, String(text))]);
  return element("section", {}, element("h2", {}, model), element("dl", {}, ...items));
}

function seconds(value) {
  return value === null ? "–" : `${value.toPrecision(2)} s`;
}

update();
