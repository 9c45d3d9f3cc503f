"use strict";
// The page is complete without this: it adds a shared cursor with values, sample filters, one
// prompt's rows out of all, and a light/dark switch.
function show(value) {
  if (value === null) return "–";
  const size = Math.abs(value);
  const text =
    size > 0 && (size < 1e-3 || size >= 1e5)
      ? value.toExponential(1)
      : value.toLocaleString("en", { maximumSignificantDigits: size < 1 ? 3 : 4 });
  return text.replaceAll("-", "−");
}

const charts = [...document.querySelectorAll("[data-chart]")].map((figure) => {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot");
  const cursor = document.createElement("div");
  cursor.className = "cursor";
  cursor.hidden = true;
  plot.append(cursor);
  const cells = [...figure.querySelectorAll(".legend [data-series]")];
  const rest = cells.map((cell) => cell.textContent);
  const note = figure.querySelector("figcaption span");
  return { data, plot, cursor, cells, rest, note, words: note.textContent };
});

function point(step) {
  for (const chart of charts) {
    const { first, last, series } = chart.data;
    if (step === null || step < first || step > last) {
      chart.cursor.hidden = true;
      chart.cells.forEach((cell, i) => (cell.textContent = chart.rest[i]));
      chart.note.textContent = chart.words;
      continue;
    }
    let at = null;
    series.forEach((line, i) => {
      let best = null;
      for (const entry of line.values) {
        if (best === null || Math.abs(entry[0] - step) < Math.abs(best[0] - step)) best = entry;
      }
      chart.cells[i].textContent = show(best[1]);
      at = at ?? best[0];
    });
    chart.cursor.style.left = `${last === first ? 50 : (100 * (at - first)) / (last - first)}%`;
    chart.cursor.hidden = false;
    chart.note.textContent = `step ${at.toLocaleString("en")}`;
  }
}

for (const { plot, data } of charts) {
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    point(data.first + share * (data.last - data.first));
  });
  plot.addEventListener("pointerleave", () => point(null));
}

for (const svg of document.querySelectorAll(".packing svg")) {
  const pieces = [...svg.querySelectorAll("[data-group]")];
  const show = (group) => {
    svg.classList.toggle("one", group !== undefined);
    for (const piece of pieces) piece.classList.toggle("on", piece.dataset.group === group);
  };
  svg.addEventListener("pointerover", (e) => show(e.target.closest("[data-group]")?.dataset.group));
  svg.addEventListener("pointerleave", () => show(undefined));
}

const filter = document.querySelector(".filter");
if (filter) {
  const buttons = [...filter.querySelectorAll("button")];
  filter.hidden = buttons.length < 3; // all prompts are of one kind
  const more = document.querySelector("#more-prompts");
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const kind = button.dataset.kind;
      buttons.forEach((b) => b.setAttribute("aria-pressed", String(b === button)));
      document.querySelectorAll(".prompt[data-change]").forEach((card) => {
        card.hidden = kind !== "all" && card.dataset.change !== kind;
      });
      if (more && kind !== "all") more.open = true;
    });
  }
}

const theme = document.querySelector("#theme");
theme.hidden = false;
theme.addEventListener("click", () => {
  const root = document.documentElement;
  const now = root.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.style.colorScheme = now === "dark" ? "light" : "dark";
});
