"use strict";
const cells = JSON.parse(document.getElementById("cells").textContent);

// Tables: a click on a heading sorts down, then up, then restores the printed order.
function valueOf(td) {
  const text = td ? td.dataset.value ?? td.textContent.trim() : "";
  const found = text.replace(/\u2212/g, "-").match(/[-+]?\d+(\.\d+)?/);
  if (!found) return text === "" ? -Infinity : text;
  const number = parseFloat(found[0]);
  return text.startsWith(">=") ? number + 1e-6 : text.startsWith("<") ? number - 1e-6 : number;
}
function sortBy(table, column, heading) {
  const body = table.tBodies[0];
  if (!table.original) table.original = [...body.rows];
  const before = heading.getAttribute("aria-sort");
  for (const th of table.tHead.rows[0].cells) th.removeAttribute("aria-sort");
  let rows = table.original;
  if (before !== "ascending") {
    const next = before === "descending" ? "ascending" : "descending";
    heading.setAttribute("aria-sort", next);
    const sign = next === "ascending" ? 1 : -1;
    const name = heading.classList.contains("name");
    rows = [...rows].sort((a, b) => {
      const [x, y] = name ? [a.cells[column].textContent, b.cells[column].textContent]
        : [valueOf(a.cells[column]), valueOf(b.cells[column])];
      if (typeof x === "number" && typeof y === "number") return sign * (x - y) || 0;
      return sign * String(x).localeCompare(String(y), "en", { numeric: true });
    });
  }
  table.classList.toggle("sorted", rows !== table.original);
  body.replaceChildren(...rows);
}
for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((th, i) => {
    th.tabIndex = 0;
    th.title = "Sort by this column";
    th.addEventListener("click", () => sortBy(table, i, th));
    th.addEventListener("keydown", (e) => {
      if (e.key === "Enter" || e.key === " ") { e.preventDefault(); sortBy(table, i, th); }
    });
  });
}

// A cell shows its chain. All text is set as text, never as markup.
const dialog = document.getElementById("chain"), chainBody = document.getElementById("chain-body");
function element(tag, text, kind) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
}
function pairs(entries) {
  const list = element("dl");
  for (const [key, value] of entries) {
    if (value === null || value === undefined || value === "") continue;
    list.append(element("dt", key), element("dd", String(value)));
  }
  return list;
}
function showChain(key) {
  const cell = cells.cells[key];
  if (!cell) return;
  chainBody.replaceChildren();
  const title = element("h3", cell.title);
  title.id = "chain-title";
  chainBody.append(title, pairs(cell.facts), element("strong", "Where it comes from"));
  const list = element("ol", undefined, "chain");
  for (const step of cell.chain) {
    const item = element("li");
    item.append(element("span", step.what), document.createElement("br"));
    for (const [name, hash] of step.hashes ?? []) {
      item.append(element("code", `${name} ${hash}`, "hash"), document.createElement("br"));
    }
    if (step.details !== undefined) {
      const more = element("details");
      more.append(element("summary", "settings"), element("pre", cells.records[step.details]));
      item.append(more);
    }
    list.append(item);
  }
  chainBody.append(list, element("strong", "Make it again"), element("pre", cell.command));
  dialog.showModal();
  dialog.scrollTop = 0;
}
document.addEventListener("click", (e) => {
  const button = e.target.closest("button[data-cell]");
  if (button) showChain(button.dataset.cell);
  if (e.target === dialog) dialog.close();
});

// Points of figures: browsers show a title on hover; a tap shows it too.
let bubble = null;
document.addEventListener("click", (e) => {
  if (bubble) { bubble.remove(); bubble = null; }
  const tip = e.target.closest ? e.target.closest(".tip") : null;
  const title = tip ? tip.querySelector("title") : null;
  if (!title) return;
  bubble = element("div", title.textContent);
  bubble.id = "bubble";
  document.body.append(bubble);
  const box = bubble.getBoundingClientRect();
  bubble.style.left = Math.max(4, Math.min(e.clientX - box.width / 2, innerWidth - box.width - 4)) + "px";
  bubble.style.top = Math.max(4, e.clientY - box.height - 12) + "px";
});
