// The colors: those of the system, or those that the user chose. Runs before the page is drawn.
"use strict";

(() => {
  const KEY = "nextllm.theme";

  function stored() {
    try {
      return localStorage.getItem(KEY) ?? "system";
    } catch {
      return "system"; // the browser keeps nothing
    }
  }

  function choose(theme) {
    document.documentElement.dataset.theme = theme;
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // the choice lasts as long as this page
    }
  }

  document.documentElement.dataset.theme = stored();
  addEventListener("DOMContentLoaded", () => {
    const select = document.getElementById("theme");
    select.value = document.documentElement.dataset.theme;
    select.addEventListener("change", () => choose(select.value));
  });
})();
