// A switch in the header of every page that shows its code; the choice is kept from page to page.
(() => {
  const root = document.documentElement;
  const key = "effspinenet-code";
  const stored = () => {
    try { return localStorage.getItem(key); } catch { return null; }
  };
  if (stored() === "shown") root.dataset.code = "shown";
  document.addEventListener("DOMContentLoaded", () => {
    const bar = document.querySelector(".article-header-buttons");
    if (!bar || !document.querySelector(".bd-article .cell_input")) return;
    const button = document.createElement("button");
    button.className = "btn btn-sm esn-code-switch";
    const label = () => {
      const shown = root.dataset.code === "shown";
      button.textContent = shown ? "Hide code" : "Show code";
      button.setAttribute("aria-pressed", String(shown));
    };
    button.addEventListener("click", () => {
      root.dataset.code = root.dataset.code === "shown" ? "hidden" : "shown";
      try { localStorage.setItem(key, root.dataset.code); } catch { /* this page alone, then */ }
      label();
    });
    label();
    bar.prepend(button);
  });
})();
