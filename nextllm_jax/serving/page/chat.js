// The chat page: sends the messages of a conversation, and shows the answer while it comes.

import { ServerError, listModels, stream } from "./api.js";
import {
  deleteConversation, isConversationKey, loadConversations, newConversation, saveConversation,
} from "./conversations.js";
import { element } from "./markdown.js";
import { lastText, showMessages, updateLast } from "./messages.js";
import * as settings from "./settings.js";
import { showConversations, showSidebar } from "./sidebar.js";

const TITLE_CHARACTERS = 60;
const COMPLETION_TOKENS = 256; // the server's own limit on a completion is for a few words

const [prompt, send, stop, regenerate, modelSelect, notice, errorLine, announcer] = [
  "prompt", "send", "stop", "regenerate", "model", "notice", "error", "announcer",
].map((id) => document.getElementById(id));

let conversations = [];
let current = newConversation();
let running = null; // the AbortController of the answer that comes
const withoutTemplate = new Set(); // models that cannot chat

// Conversations

const actions = {
  open(conversation) {
    show(conversation);
    prompt.focus();
  },
  rename(conversation, title) {
    conversation.title = title;
    save(conversation);
  },
  remove(conversation) {
    deleteConversation(conversation);
    conversations = conversations.filter((each) => each !== conversation);
    if (conversation === current) show(newConversation());
    else drawList();
    document.getElementById("new").focus();
  },
};

function show(conversation) {
  running?.abort();
  running = null;
  announcer.textContent = "";
  current = conversation;
  showError("");
  showSidebar(false);
  draw();
}

function draw() {
  showMessages(current.messages);
  drawList();
  drawButtons();
}

function drawList() {
  showConversations(conversations, current, actions);
}

function drawButtons() {
  const last = current.messages.at(-1);
  const focused = document.activeElement;
  send.hidden = running !== null;
  stop.hidden = running === null;
  regenerate.hidden = running !== null || !last;
  regenerate.textContent = last?.role === "user" ? "Try again" : "Regenerate";
  if (focused?.hidden) prompt.focus();
}

function save(conversation) {
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  try {
    saveConversation(conversation);
  } catch {
    showError("The browser could not keep this conversation: its storage is full or off. Delete other conversations.");
  }
  drawList();
}

function readStorage() {
  try {
    conversations = loadConversations();
  } catch {
    // The storage is off, which is shown when something is to be kept.
  }
}

addEventListener("storage", (event) => {
  if (running || !isConversationKey(event.key)) return;
  readStorage(); // another tab has changed them
  current = conversations.find((each) => each.id === current.id) ?? newConversation();
  draw();
});

// Answers

/** Add an answer to the conversation, which ends with a message of the user. If none comes, `replaced` stays. */
async function answer(replaced = []) {
  const conversation = current;
  const controller = (running = new AbortController());
  const message = { role: "assistant", content: "", note: "…" };
  const history = [...conversation.messages];
  conversation.messages.push(message);
  showError("");
  draw();
  announcer.textContent = "The model is answering.";
  try {
    message.note = await receive(history, message, controller.signal);
  } catch (error) {
    message.note = error.name === "AbortError" ? "Stopped." : "Ended with an error.";
    if (!message.content) conversation.messages.splice(-1, 1, ...replaced);
    if (error.name !== "AbortError") fail(error);
  }
  conversation.changed = Date.now();
  if (running === controller) running = null;
  if (conversations.includes(conversation)) save(conversation);
  if (conversation === current) {
    draw();
    announcer.textContent = lastText();
  }
}

/** Append the answer to the message as it comes; a line about its length and speed. */
async function receive(history, message, signal) {
  const start = performance.now();
  let first = null;
  let tokens = 0;
  let reason = null;
  let drawing = 0;
  try {
    for await (const { choices, usage } of chunks(history, signal)) {
      const text = choices[0]?.delta?.content ?? choices[0]?.text ?? "";
      if (text) first ??= performance.now();
      message.content += text;
      reason = choices[0]?.finish_reason ?? reason;
      tokens = usage?.completion_tokens ?? tokens;
      drawing ||= requestAnimationFrame(() => {
        drawing = 0;
        if (!signal.aborted) updateLast(message);
      });
    }
  } finally {
    cancelAnimationFrame(drawing);
  }
  const seconds = (performance.now() - start) / 1000;
  const parts = [`${tokens} tokens`, `${(tokens / seconds).toFixed(1)} tokens/s`];
  if (first !== null) parts.push(`first text after ${((first - start) / 1000).toFixed(2)} s`);
  if (reason === "length") parts.push("truncated at max tokens");
  return parts.join(", ");
}

/** The chunks of the answer to a chat, or of the text that goes on if the model has no chat template. */
async function* chunks(history, signal) {
  const model = settings.model();
  const fields = { model, ...settings.requestFields() };
  const system = settings.system();
  const first = system ? [{ role: "system", content: system }] : [];
  const messages = [...first, ...history].map(({ role, content }) => ({ role, content }));
  if (!withoutTemplate.has(model)) {
    try {
      yield* stream("/v1/chat/completions", { ...fields, messages }, settings.key(), signal);
      return;
    } catch (error) {
      if (error.status !== 400 || error.param !== "model") throw error;
      withoutTemplate.add(model);
      showNotice();
    }
  }
  const text = messages.map(({ content }) => content).join("");
  yield* stream("/v1/completions", { max_tokens: COMPLETION_TOKENS, ...fields, prompt: text }, settings.key(), signal);
}

function fail(error) {
  if (!(error instanceof ServerError)) console.error(error);
  showError(error instanceof ServerError ? error.message : `The page failed: ${error.message}`);
  if (error.status === 401) changeSettings({ focus: "key", error: error.message });
}

function showError(text) {
  errorLine.textContent = text;
  errorLine.hidden = !text;
}

function showNotice() {
  const model = settings.model();
  notice.hidden = !withoutTemplate.has(model);
  notice.textContent = `${model} has no chat template: it continues your text, and the next message is added to its end.`;
}

// Models and settings

async function readModels() {
  try {
    const names = await listModels(settings.key());
    modelSelect.replaceChildren(...names.map((name) => element("option", {}, name)));
    settings.chooseModel(names.includes(settings.model()) ? settings.model() : names[0]);
    modelSelect.value = settings.model();
    showError("");
  } catch (error) {
    fail(error);
  }
}

function changeSettings(options) {
  settings.openSettings(readModels, options);
}

// What the user does

document.getElementById("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running || !prompt.value.trim()) return;
  const content = prompt.value;
  prompt.value = "";
  current.messages.push({ role: "user", content });
  current.title ||= content.trim().replace(/\s+/g, " ").slice(0, TITLE_CHARACTERS);
  current.changed = Date.now();
  save(current);
  answer();
});

prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) event.target.form.requestSubmit();
});

addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  running?.abort();
  showSidebar(false);
});

// A reload ends requests with an error before pagehide, and phones close pages without beforeunload.
for (const type of ["beforeunload", "pagehide"]) addEventListener(type, leave);

function leave() {
  if (!running) return;
  running.abort();
  current.messages.at(-1).note = "Stopped.";
  save(current);
}

stop.addEventListener("click", () => running?.abort());

regenerate.addEventListener("click", () => {
  const isAnswered = current.messages.at(-1).role !== "user";
  prompt.focus();
  answer(isAnswered ? current.messages.splice(-1) : []);
});

document.getElementById("new").addEventListener("click", () => actions.open(newConversation()));
document.getElementById("open-settings").addEventListener("click", () => changeSettings({ focus: "system", error: "" }));
modelSelect.addEventListener("change", () => {
  settings.chooseModel(modelSelect.value);
  showNotice();
});

readStorage();
show(conversations[0] ?? current);
readModels();
