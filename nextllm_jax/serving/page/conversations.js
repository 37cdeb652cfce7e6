// The conversations, in the browser's storage. Each has a key of its own, so two tabs do not overwrite each other's.

const PREFIX = "nextllm.conversation.";

/** A conversation without messages, which is stored once it has some. */
export function newConversation() {
  return { id: newId(), title: "", changed: Date.now(), messages: [] };
}

function newId() {
  // crypto.randomUUID exists only with HTTPS or on this machine.
  return Array.from(crypto.getRandomValues(new Uint32Array(4)), (word) => word.toString(16).padStart(8, "0")).join("");
}

/** All stored conversations, the latest first. */
export function loadConversations() {
  const found = [];
  for (const key of Object.keys(localStorage)) {
    const conversation = key.startsWith(PREFIX) ? parse(localStorage.getItem(key)) : null;
    if (conversation) found.push(conversation);
  }
  return found.sort((a, b) => b.changed - a.changed);
}

function parse(text) {
  try {
    const { id, title, changed, messages } = JSON.parse(text);
    const isMessage = (each) => typeof each.role === "string" && typeof each.content === "string";
    return typeof id === "string" && messages.every(isMessage) ? { id, title: String(title), changed, messages } : null;
  } catch {
    return null; // what this page did not write
  }
}

/** Store a conversation. Throws if the storage is full or off. */
export function saveConversation(conversation) {
  localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
}

export function deleteConversation(conversation) {
  localStorage.removeItem(PREFIX + conversation.id);
}

/** Whether a storage event is about a conversation. */
export function isConversationKey(key) {
  return key === null || key.startsWith(PREFIX);
}
