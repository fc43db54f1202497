// ---- theme, size of the window, paper ----
const THEMES = ["auto", "light", "dark"], PAPER = "680px";
{
  const use = (theme) => {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    document.getElementById("theme").textContent = `theme: ${theme}`;
    drawCharts();
    drawResponses();
    drawAnswers();
  };
  const width = (value) => { const answers = document.getElementById("answers"); if (answers) answers.style.width = value; };
  let theme = THEMES.includes(location.hash.replace("#theme-", "")) ? location.hash.replace("#theme-", "") : "auto", waiting = 0;
  document.getElementById("theme").addEventListener("click", () => { theme = THEMES[(THEMES.indexOf(theme) + 1) % 3]; use(theme); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => use(theme));
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => laidOut.forEach(layOut), 120); });
  addEventListener("beforeprint", () => { width(PAPER); use("light"); });
  addEventListener("afterprint", () => { width(""); use(theme); });
  use(theme);
}
