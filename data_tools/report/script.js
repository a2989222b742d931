"use strict";
// The page is complete without this: it filters, sorts, and writes down decisions as a command.
(() => {
  const byId = (id) => document.getElementById(id);
  const cards = byId("cards");
  const all = [...cards.children];
  const texts = new Map(all.map((card) => [card, card.textContent.toLowerCase()]));
  const descending = { lost: true, words: true };

  const refresh = () => {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const verdict = byId("verdict").value;
    const check = byId("check").value;
    let shown = 0;
    for (const card of all) {
      const fits =
        (!verdict || card.dataset.verdict === verdict) &&
        (!check || card.dataset.checks.split(" ").includes(check)) &&
        words.every((word) => texts.get(card).includes(word));
      card.hidden = !fits;
      shown += fits;
    }
    byId("count").textContent = `${shown.toLocaleString("en")} shown`;
  };

  const sort = () => {
    const key = byId("sort").value;
    const sign = descending[key] ? -1 : 1;
    const value = (card) => sign * Number(card.dataset[key]);
    cards.append(...[...all].sort((a, b) => value(a) - value(b) || a.dataset.order - b.dataset.order));
  };

  for (const id of ["search", "verdict", "check"]) byId(id).addEventListener("input", refresh);
  byId("sort").addEventListener("input", sort);
  for (const id of ["crops", "veils"]) {
    byId(id)?.addEventListener("input", (event) => cards.classList.toggle(`no-${id}`, !event.target.checked));
  }
  document.querySelector(".filter").addEventListener("submit", (event) => event.preventDefault());

  const decisions = new Map();
  // A name in single quotes is one word for a POSIX shell, whatever else it holds.
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

  const tell = () => {
    const parts = [...decisions].map(([name, verdict]) => `  --${verdict}=${quoted(name)} \\\n`);
    byId("decisions").hidden = !decisions.size;
    byId("decided").textContent = `${decisions.size} ${decisions.size === 1 ? "decision" : "decisions"}.`;
    byId("command").textContent =
      `finetune data clean ${quoted(cards.dataset.folder)} \\\n${parts.join("")}  --write`;
  };

  const press = (card, verdict) => {
    for (const button of card.querySelectorAll(".choice button")) {
      button.setAttribute("aria-pressed", String(button.className === verdict));
    }
    card.classList.remove("keep", "review", "drop");
    card.classList.add(verdict);
  };

  cards.addEventListener("click", (event) => {
    const button = event.target.closest(".choice button");
    if (!button) return;
    const card = button.closest(".card");
    press(card, button.className);
    if (button.className === card.dataset.verdict) decisions.delete(card.dataset.name);
    else decisions.set(card.dataset.name, button.className);
    tell();
  });
  byId("copy").addEventListener("click", () => {
    const range = document.createRange();
    range.selectNodeContents(byId("command"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    document.execCommand("copy");
  });
  byId("forget").addEventListener("click", () => {
    decisions.clear();
    for (const card of all) press(card, card.dataset.verdict);
    tell();
  });
})();
