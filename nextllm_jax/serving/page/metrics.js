// The part of Prometheus's text format that the server writes.

const SAMPLE = /^(\w+)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const ESCAPED = { n: "\n" };

/** The samples of a text, each with its name, labels and value. */
export function parseMetrics(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const match = SAMPLE.exec(line);
    if (!match) continue; // a comment
    const labels = {};
    for (const [, name, quoted] of (match[2] ?? "").matchAll(LABEL)) {
      labels[name] = quoted.replace(/\\(.)/g, (_, character) => ESCAPED[character] ?? character);
    }
    found.push({ name: match[1], labels, value: Number(match[3].replace("Inf", "Infinity")) });
  }
  return found;
}

/** A quantile of a histogram's buckets, interpolated in its bucket; null if nothing was observed. */
export function quantile(buckets, part) {
  const sorted = buckets
    .map(({ labels, value }) => ({ most: Number(labels.le.replace("Inf", "Infinity")), count: value }))
    .sort((a, b) => a.most - b.most);
  const total = sorted.at(-1)?.count ?? 0;
  if (!total) return null;
  let [least, before] = [0, 0];
  for (const { most, count } of sorted) {
    if (count >= part * total) {
      return most === Infinity ? least : least + ((most - least) * (part * total - before)) / (count - before);
    }
    [least, before] = [most, count];
  }
  return least;
}
