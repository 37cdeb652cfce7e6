// The list of conversations: choose, rename, delete.

import { element } from "./markdown.js";

const list = document.getElementById("conversations");
const dialog = document.getElementById("confirm");
const menu = document.getElementById("menu");

menu.addEventListener("click", () => showSidebar(menu.getAttribute("aria-expanded") === "false"));

/** Show or hide the list where the window is too narrow for it. */
export function showSidebar(shown) {
  menu.setAttribute("aria-expanded", String(shown));
  document.body.classList.toggle("sidebar-open", shown);
}

/** Draw the list. `actions` are open, rename(conversation, title) and remove. */
export function showConversations(conversations, current, actions) {
  list.replaceChildren(...conversations.map((each) => entry(each, each.id === current.id, actions)));
}

function entry(conversation, isCurrent, actions) {
  const { title } = conversation;
  const open = button("open", title, title, () => actions.open(conversation));
  if (isCurrent) open.setAttribute("aria-current", "true");
  const rename = button("icon", "✎", `Rename ${title}`, () => startRename(node, conversation, actions));
  const remove = button("icon", "✕", `Delete ${title}`, () => confirmRemoval(conversation, actions));
  const node = element("li", {}, open, rename, remove);
  return node;
}

function button(className, text, label, click) {
  const node = element("button", { type: "button", className, title: label, ariaLabel: label }, text);
  node.addEventListener("click", click);
  return node;
}

function startRename(node, conversation, actions) {
  const input = element("input", { value: conversation.title, maxLength: 100, ariaLabel: "New name" });
  let done = false;
  const finish = (title) => {
    if (done) return;
    done = true;
    actions.rename(conversation, title.trim() || conversation.title);
  };
  input.addEventListener("blur", () => finish(input.value));
  input.addEventListener("keydown", (event) => {
    if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    finish(event.key === "Enter" ? input.value : conversation.title);
    list.querySelector("[aria-current]")?.focus();
  });
  node.replaceChildren(input);
  input.select();
  input.focus();
}

function confirmRemoval(conversation, actions) {
  document.getElementById("confirm-text").textContent = `Delete “${conversation.title}”?`;
  dialog.querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    dialog.close();
    if (event.submitter.value === "delete") actions.remove(conversation);
  };
  dialog.showModal();
}
