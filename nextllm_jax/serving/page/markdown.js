// Markdown as DOM nodes. Text enters the page only as text nodes and attributes get no text of the model, except the
// address of a link, which is http or https: nothing that a model writes is parsed as HTML or run.
// Nesting is limited, and a search that failed is not repeated, so the time grows linearly with the text.

const MAX_DEPTH = 8;
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const INTERRUPTING_ITEM = /^ {0,3}(?:[-*+]|1[.)]) +\S/;
const TABLE_RULE = /^\|?:?-+:?(?:\|:?-+:?)*\|?$/; // of a line without blanks
const BLOCKS = [code, heading, rule, quote, list, table, paragraph];

/** The nodes of a text. */
export function renderMarkdown(text) {
  return blocks(text.replaceAll("\r", "").split("\n"), 0);
}

/** An element with children, which are nodes, text, or lists of these. */
export function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  for (const child of children.flat()) node.append(child); // a list can be too long for arguments
  return node;
}

function blocks(lines, depth) {
  const nodes = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    for (const block of BLOCKS) {
      const found = block(lines, at, depth);
      if (found) {
        nodes.push(found.node);
        at = found.next;
        break;
      }
    }
  }
  return nodes;
}

// Each of these returns the block that begins at a line, and the line after it; null if there is none of its kind.

function code(lines, at) {
  const match = FENCE.exec(lines[at]);
  if (!match) return null;
  const [, fence, info] = match;
  const indent = lines[at].indexOf(fence);
  const isEnd = (line) => line.trim().length >= fence.length && !line.trim().replaceAll(fence[0], "");
  let end = at + 1;
  while (end < lines.length && !isEnd(lines[end])) end += 1;
  const text = lines.slice(at + 1, end).map((line) => dedent(line, indent)).join("\n");
  const bar = element(
    "div",
    { className: "code-bar" },
    element("span", {}, info.trim().split(/\s/)[0]),
    element("button", { type: "button", className: "copy" }, "Copy"),
  );
  const node = element("div", { className: "code" }, bar, element("pre", { tabIndex: 0 }, element("code", {}, text)));
  return { node, next: end + 1 };
}

function heading(lines, at) {
  const match = HEADING.exec(lines[at]);
  if (!match) return null;
  const level = Math.min(match[1].length + 2, 6); // below the page's own headings
  return { node: element(`h${level}`, {}, inline(match[2].replace(/ #+ *$/, ""))), next: at + 1 };
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? { node: element("hr"), next: at + 1 } : null;
}

function quote(lines, at, depth) {
  if (depth === MAX_DEPTH || !QUOTE.test(lines[at])) return null;
  let next = at;
  while (next < lines.length && QUOTE.test(lines[next])) next += 1;
  const inner = lines.slice(at, next).map((line) => line.replace(QUOTE, ""));
  return { node: element("blockquote", {}, blocks(inner, depth + 1)), next };
}

function list(lines, at, depth) {
  const first = item(lines[at]);
  if (depth === MAX_DEPTH || !first) return null;
  const node = element(first.ordered ? "ol" : "ul");
  if (first.ordered) node.start = first.number;
  let next = at;
  while (next < lines.length) {
    const found = item(lines[next]);
    if (found?.ordered !== first.ordered || found.indent >= first.indent + 2 || RULE.test(lines[next])) break;
    const end = endOfItem(lines, next, first.indent);
    const inner = lines.slice(next + 1, end).map((line) => dedent(line, found.width));
    node.append(element("li", {}, blocks([spaces(lines[next]).slice(found.width), ...inner], depth + 1)));
    next = end;
  }
  return { node, next };
}

/** What a line that begins an item is; null for another line. */
function item(line) {
  const match = ITEM.exec(spaces(line));
  if (!match) return null;
  const [all, indent, marker] = match;
  const ordered = /\d/.test(marker);
  return { indent: indent.length, width: all.length, ordered, number: ordered ? parseInt(marker, 10) : null };
}

/** The line after an item: its lines are indented, or go on with its paragraph. Blank lines at its end are in it. */
function endOfItem(lines, at, indent) {
  let end = at + 1;
  for (let afterBlank = false; end < lines.length; end += 1) {
    const line = lines[end];
    const isInside = /\S/.exec(spaces(line))?.index >= indent + 2;
    if (line.trim() && !isInside && (afterBlank || item(line) || interrupts(line))) break;
    afterBlank = !line.trim();
  }
  return end;
}

function table(lines, at) {
  const isTable = lines[at].includes("|") && lines[at + 1]?.includes("|") && TABLE_RULE.test(lines[at + 1].replace(/\s/g, ""));
  if (!isTable) return null;
  let next = at + 2;
  while (next < lines.length && lines[next].includes("|")) next += 1;
  const names = cells(lines[at]);
  const row = (kind, texts) => element("tr", {}, texts.map((text) => element(kind, {}, inline(text))));
  const rows = lines.slice(at + 2, next).map((line) => row("td", cells(line).slice(0, names.length)));
  const node = element("table", {}, element("thead", {}, row("th", names)), element("tbody", {}, rows));
  return { node: element("div", { className: "table", tabIndex: 0 }, node), next };
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((text) => text.trim().replaceAll("\\|", "|"));
}

function paragraph(lines, at) {
  let next = at + 1;
  while (next < lines.length && lines[next].trim() && !interrupts(lines[next])) next += 1;
  return { node: element("p", {}, inline(lines.slice(at, next).join("\n").trim())), next };
}

/** Whether a line ends the paragraph before it. */
function interrupts(line) {
  return [FENCE, HEADING, RULE, QUOTE, INTERRUPTING_ITEM].some((pattern) => pattern.test(line));
}

/** A line whose leading tabs are spaces. */
function spaces(line) {
  return line.replace(/^[ \t]+/, (blank) => blank.replaceAll("\t", "    "));
}

/** A line without its first spaces, at most `count`. */
function dedent(line, count) {
  if (!/^[ \t]/.test(line)) return line;
  const wide = spaces(line);
  return wide.slice(Math.min(count, wide.search(/\S|$/)));
}

const INLINE = new RegExp(
  [
    /\\(?<escaped>[!-/:-@[-`{-~])/,
    /(?<ticks>`+)/,
    /!?\[(?<label>[^[\]]{1,500})\]\((?<target>[^()\s]{1,2000}(?:\([^()\s]{0,200}\)[^()\s]{0,200})?)(?: +"[^"]{0,500}")?\)/,
    /<(?<address>https?:\/\/[^\s<>]+)>/,
    /\b(?<bare>https?:\/\/[^\s<>"`]+)/,
    /(?<mark>\*\*|__|~~|\*|_)/,
  ]
    .map((pattern) => pattern.source)
    .join("|"),
  "g",
);
const MARKED = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };

/** The nodes of a text without blocks. */
function inline(text, depth = 0) {
  if (depth === MAX_DEPTH) return [text];
  const nodes = [];
  const failed = new Set(); // marks that nothing closes from here on
  const pattern = new RegExp(INLINE);
  let at = 0;
  for (let match; (match = pattern.exec(text)); ) {
    const found = span(text, match, depth, failed);
    if (!found) continue;
    nodes.push(text.slice(at, match.index), found.node);
    at = pattern.lastIndex = found.next;
  }
  nodes.push(text.slice(at));
  return nodes.filter((node) => node !== "");
}

/** The node of a match and where it ends; null if its characters are just text. */
function span(text, match, depth, failed) {
  const { escaped, ticks, label, target, address, bare, mark } = match.groups;
  const end = match.index + match[0].length;
  if (escaped) return { node: escaped, next: end };
  if (ticks) return codeSpan(text, ticks, end);
  if (label) return link(target, inline(label, depth + 1), end);
  if (address) return link(address, [address], end);
  if (bare) {
    const url = bare.slice(0, endOfUrl(bare));
    return link(url, [url], match.index + url.length);
  }
  const close = failed.has(mark) ? -1 : closing(text, mark, match.index, end);
  if (close < 0) return null;
  if (close === Infinity) {
    failed.add(mark);
    return null;
  }
  return { node: element(MARKED[mark], {}, inline(text.slice(end, close), depth + 1)), next: close + mark.length };
}

/** The length of an address without the punctuation after it. */
function endOfUrl(text) {
  const ends = text.includes("(") ? ".,;:!?]*_~'" : ".,;:!?]*_~')";
  let length = text.length;
  while (ends.includes(text[length - 1])) length -= 1;
  return length;
}

function codeSpan(text, ticks, start) {
  const runs = /`+/g;
  runs.lastIndex = start;
  for (let run; (run = runs.exec(text)); ) {
    if (run[0] === ticks) {
      const inner = text.slice(start, run.index);
      const isPadded = /^ .* $/s.test(inner) && inner.trim();
      return { node: element("code", {}, isPadded ? inner.slice(1, -1) : inner), next: runs.lastIndex };
    }
  }
  return null;
}

function link(target, label, next) {
  if (!/^https?:\/\//i.test(target) || !URL.canParse(target)) return null;
  const node = element("a", { href: target, target: "_blank", rel: "noopener noreferrer" }, label);
  for (const inner of node.querySelectorAll("a")) inner.replaceWith(...inner.childNodes);
  return { node, next };
}

/** Where the mark is that closes one; -1 if this one opens nothing, and Infinity if nothing closes it. */
function closing(text, mark, index, start) {
  const inWord = (at) => /\w/.test(text[at] ?? " ");
  const blank = (at) => /\s/.test(text[at] ?? " ");
  if (blank(start) || (mark[0] === "_" && inWord(index - 1))) return -1;
  for (let at = text.indexOf(mark, start + 1); at >= 0; at = text.indexOf(mark, at + 1)) {
    if (mark.length === 1 && text[at + 1] === mark) {
      at += 1; // a double mark
      continue;
    }
    while (mark.length === 2 && text[at + 2] === mark[0]) at += 1; // the inner mark comes first
    if (!blank(at - 1) && text[at - 1] !== "\\" && !(mark[0] === "_" && inWord(at + mark.length))) return at;
  }
  return Infinity;
}
