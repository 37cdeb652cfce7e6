// What the user chose: the model and how it samples, kept by the browser, and the API key, kept until the tab is closed.

const SETTINGS = "nextllm.settings";
const KEY = "nextllm.key";
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

const dialog = document.getElementById("settings");
const form = dialog.querySelector("form");
const values = load();

function load() {
  try {
    return { ...JSON.parse(localStorage.getItem(SETTINGS)), key: sessionStorage.getItem(KEY) ?? "" };
  } catch {
    return { key: "" };
  }
}

function save() {
  const { key, ...others } = values;
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(others));
    sessionStorage.setItem(KEY, key);
  } catch {
    // the browser keeps nothing: they last as long as this page
  }
}

export const model = () => values.model;
export const key = () => values.key;
export const system = () => values.system ?? "";

/** The fields of a request that the user has set. */
export function requestFields() {
  const set = NUMBERS.filter((name) => Number.isFinite(values[name]));
  return Object.fromEntries(set.map((name) => [name, values[name]]));
}

export function chooseModel(name) {
  values.model = name;
  save();
}

/** Let the user change the settings, and call `saved` if they are saved. */
export function openSettings(saved, { focus, error }) {
  if (dialog.open) return;
  document.getElementById("settings-error").textContent = error;
  for (const name of ["system", "key", ...NUMBERS]) form.elements[name].value = values[name] ?? "";
  form.onsubmit = (event) => {
    event.preventDefault();
    dialog.close();
    if (event.submitter.value === "save") read(saved);
  };
  dialog.showModal();
  form.elements[focus].focus();
}

function read(saved) {
  values.system = form.elements.system.value;
  values.key = form.elements.key.value.trim();
  for (const name of NUMBERS) {
    const number = form.elements[name].valueAsNumber;
    values[name] = Number.isNaN(number) ? null : number;
  }
  save();
  saved();
}
