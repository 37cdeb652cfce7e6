// The messages of a conversation as the page shows them.

import { element, renderMarkdown } from "./markdown.js";

const container = document.getElementById("messages");
const NEAR_PIXELS = 60;

container.addEventListener("click", (event) => {
  if (event.target.matches("button.copy")) copy(event.target);
});

/** Draw all messages, and go to the last one. */
export function showMessages(messages) {
  container.replaceChildren(...messages.map(article));
  container.scrollTop = container.scrollHeight;
}

function article(message) {
  const isUser = message.role === "user";
  const label = isUser ? "You" : "Answer";
  const node = element("article", { className: `message ${message.role}`, ariaLabel: label });
  node.append(element("div", { className: "content" }), element("p", { className: "note" }));
  draw(node, message);
  return node;
}

function draw(node, message) {
  const [content, note] = node.children;
  if (message.role === "user") content.replaceChildren(message.content);
  else replaceChanged(content, renderMarkdown(message.content));
  note.textContent = message.note ?? "";
}

/** Put nodes in the place of the old ones, except those that are the same: a selection in them stays. */
function replaceChanged(parent, nodes) {
  nodes.forEach((node, index) => {
    const old = parent.childNodes[index];
    if (!old) parent.append(node);
    else if (!old.isEqualNode(node)) old.replaceWith(node);
  });
  while (parent.childNodes.length > nodes.length) parent.lastChild.remove();
}

/** Draw the last message again. The view follows its end if it was there. */
export function updateLast(message) {
  const follows = container.scrollHeight - container.scrollTop - container.clientHeight < NEAR_PIXELS;
  draw(container.lastElementChild, message);
  if (follows) container.scrollTop = container.scrollHeight;
}

/** The text of the last message without its markup. */
export function lastText() {
  return container.lastElementChild?.querySelector(".content").innerText ?? "";
}

async function copy(button) {
  const code = button.closest(".code").querySelector("code");
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    // Pages have the clipboard with HTTPS or on this machine only; elsewhere the selection can be copied.
    getSelection().selectAllChildren(code);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 2000);
}
