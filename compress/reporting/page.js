"use strict";
(() => {
  const NEXT = { none: "ascending", ascending: "descending", descending: "none" };
  const FIRST_DOWN = { none: "descending", descending: "ascending", ascending: "none" };

  function key(row, column) {
    const cell = row.cells[column];
    const text = cell.dataset.v === undefined ? cell.textContent.trim() : cell.dataset.v;
    const value = Number(text);
    return text === "" || text === "-" ? null : Number.isNaN(value) ? text : value;
  }

  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  }

  function sort(table, head, heads) {
    const steps = head.dataset.first === "descending" ? FIRST_DOWN : NEXT;
    const order = steps[head.getAttribute("aria-sort") || "none"];
    for (const other of heads) other.removeAttribute("aria-sort");
    if (order !== "none") head.setAttribute("aria-sort", order);
    table.classList.toggle("sorted", order !== "none");
    const body = table.querySelector("tbody.rows");
    const column = heads.indexOf(head);
    const rows = [...body.rows].sort((x, y) => x.dataset.place - y.dataset.place);
    if (order !== "none") {
      const sign = order === "ascending" ? 1 : -1;
      rows.sort((x, y) => {
        const a = key(x, column), b = key(y, column);
        if (a === null || b === null) return (a === null) - (b === null);
        return sign * compare(a, b);
      });
    }
    body.append(...rows);
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    [...table.querySelector("tbody.rows").rows].forEach((row, place) => { row.dataset.place = place; });
    for (const head of heads) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sort(table, head, heads));
    }
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-about]");
    if (!button) return;
    const about = document.querySelector(`#${button.getAttribute("popovertarget")} > .about`);
    about.textContent = button.dataset.about;
  });

  const closed = [];
  window.addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details.protocol-list:not([open])")) {
      part.open = true;
      closed.push(part);
    }
  });
  window.addEventListener("afterprint", () => {
    while (closed.length) closed.pop().open = false;
  });
})();
