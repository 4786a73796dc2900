/** Tables that can be sorted by their headings and copied as CSV. */
(() => {
  // Numbers are in an attribute, texts are not.
  const written = (cell) => cell.dataset.value ?? (cell.querySelector("b") ?? cell).textContent;
  const numeric = (cell) => (written(cell) ? Number(written(cell)) : null);

  /** The rows, except the one that says that there are none. */
  const rowsOf = (table) => [...table.tBodies[0].rows].filter((row) => row.cells.length > 1);
  const isShown = (row) => !row.hidden;

  function sort(table, heading) {
    const column = heading.cellIndex;
    const down = heading.getAttribute("aria-sort") !== "descending";
    const rows = rowsOf(table);
    const isText = rows.some((row) => Number.isNaN(numeric(row.cells[column])));
    const value = (row) => (isText ? written(row.cells[column]) : numeric(row.cells[column]));
    rows.sort((one, other) => {
      const [first, second] = [value(one), value(other)];
      if (first === null || second === null) return (first === null) - (second === null); // last
      const order = isText ? first.localeCompare(second) : first - second;
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  }

  /** A cell; a quote keeps spreadsheets from running a text that looks like a formula. */
  function quoted(value) {
    const text = /^[=+@\t\r]|^-(?![\d.])/.test(value) ? `'${value}` : value;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  function csv(table) {
    const head = [...table.tHead.rows[0].cells].map((cell) => cell.dataset.kind);
    const rows = rowsOf(table).filter(isShown).map((row) => [...row.cells].map(written));
    const lines = [head, ...rows].map((row) => row.map(quoted).join(","));
    return `${lines.join("\r\n")}\r\n`;
  }

  /** Falls back to the old API where the new one is not allowed, as for local files in some browsers. */
  async function copy(content) {
    try {
      await navigator.clipboard.writeText(content);
    } catch {
      const area = document.createElement("textarea");
      area.value = content;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  }

  for (const heading of document.querySelectorAll("th button")) {
    heading.addEventListener("click", () => sort(heading.closest("table"), heading.closest("th")));
  }
  for (const button of document.querySelectorAll(".copy")) {
    const said = button.textContent;
    button.addEventListener("click", async () => {
      await copy(csv(document.getElementById(button.dataset.table)));
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = said), 1600);
    });
  }
})();
