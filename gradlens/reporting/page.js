"use strict";
// The only script of a page. It reads and writes text, never markup: what stands in a page may come from a client.

const NUMBER = /^[≤≥]?\s*([+\-−]?[\d,]*\.?\d+(?:e[+\-]?\d+)?)/i;

function valueOf(cell) {
  const text = cell.textContent.trim(), found = NUMBER.exec(text);
  return { text, number: found ? Number(found[1].replaceAll(",", "").replace("−", "-")) : NaN };
}

function inOrder(one, other) {
  const known = !Number.isNaN(one.number), otherKnown = !Number.isNaN(other.number);
  if (known && otherKnown && one.number !== other.number) return one.number - other.number;
  if (known !== otherKnown) return known ? -1 : 1;
  return one.text.localeCompare(other.text, undefined, { numeric: true });
}

function sortBy(table, place) {
  const headers = [...table.tHead.rows[0].cells], header = headers[place], body = table.tBodies[0];
  const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const each of headers) each.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
  const rows = [...body.rows].map(row => ({ row, value: valueOf(row.cells[place]) }));
  rows.sort((one, other) => direction * inOrder(one.value, other.value));
  body.append(...rows.map(each => each.row));
}

function makeSortable(table) {
  [...table.tHead.rows[0].cells].forEach((header, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    button.addEventListener("click", () => sortBy(table, place));
    header.replaceChildren(button);
  });
}

function makeFilterable(table) {
  const rows = [...table.tBodies[0].rows], label = document.createElement("label");
  const field = document.createElement("input"), count = document.createElement("output");
  label.className = "filter";
  field.type = "search";
  label.append("Filter ", field, " ", count);
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    count.textContent = wanted ? `${rows.filter(row => !row.hidden).length} of ${rows.length} rows` : "";
  });
  table.closest(".scroll").before(label);
}

function nameThePoints(picture, note) {
  const points = JSON.parse(picture.dataset.points);
  picture.addEventListener("pointermove", event => {
    const box = picture.getBoundingClientRect();
    const away = ([x, y]) => Math.hypot(box.left + x * box.width - event.clientX, box.top + y * box.height - event.clientY);
    const nearest = points.reduce((best, point) => (away(point) < away(best) ? point : best));
    note.hidden = away(nearest) > 16;
    note.textContent = nearest[2];
    note.style.left = `${Math.max(0, Math.min(event.clientX + 12, innerWidth - note.offsetWidth - 8))}px`;
    note.style.top = `${event.clientY + 16}px`;
  });
  picture.addEventListener("pointerleave", () => { note.hidden = true; });
}

for (const table of document.querySelectorAll("table")) {
  if (table.tBodies[0].rows.length < 2) continue;
  makeSortable(table);
  if (table.tBodies[0].rows.length > 8) makeFilterable(table);
}
const note = document.createElement("div");
note.className = "note";
note.hidden = true;
document.body.append(note);
for (const picture of document.querySelectorAll("img[data-points]")) nameThePoints(picture, note);
