/** The steps: the fewest flows between them that hold the slider's share of all flow. */
(() => {
  const byId = (id) => document.getElementById(id);
  const list = byId("steplist");
  const rows = [...list.querySelectorAll("li")];
  const slider = byId("share");
  const says = byId("shown");
  const { flows, total } = trace.steps;
  const [WIDTH, NARROWEST, WIDEST] = [100, 0.75, 7];
  const SVG = byId("arcs").namespaceURI;
  let [shown, kept] = [[], null];

  /** The strongest flows that hold the wanted share, or all flows on the page if they hold less. */
  function strongest(share) {
    let held = 0;
    const found = [];
    for (const flow of flows) {
      if (held >= share * total) break;
      found.push(flow);
      held += flow[2];
    }
    return [found, total ? held / total : 0];
  }

  function draw() {
    const share = slider.value / 100;
    const [found, held] = strongest(share);
    shown = found;
    const ends = new Set(found.flatMap(([from, to]) => [from, to]));
    let hidden = 0;
    rows.forEach((row, place) => {
      row.hidden = ends.size > 0 && !ends.has(place);
    });
    const visible = rows.filter((row) => !row.hidden);
    visible.forEach((row, place) => {
      const before = place ? Number(visible[place - 1].dataset.number) : 0;
      hidden = Number(row.dataset.number) - before - 1;
      row.classList.toggle("gap", hidden > 0);
      row.dataset.hidden = `${hidden} more`;
    });
    const limit = held < share - 0.005 ? ", as many as fit here" : "";
    says.textContent = `showing ${visible.length} of ${says.dataset.steps} steps and ${found.length} of ${says.dataset.flows} flows: ${tokens.percent(held)} of the flow between steps${limit}`;
    slider.setAttribute("aria-valuetext", `${slider.value} % of the flow`);
    arcs();
    mark(kept);
  }

  function arcs() {
    const svg = byId("arcs");
    const height = list.querySelector("ol").offsetHeight;
    const middle = (place) => rows[place].offsetTop + rows[place].offsetHeight / 2;
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${height}`);
    svg.setAttribute("height", height);
    const largest = Math.max(...shown.map(([, , flow]) => flow), 0);
    const longest = Math.max(...shown.map(([from, to]) => middle(to) - middle(from)), 1);
    // The weakest first, so that the strongest lie on top.
    svg.replaceChildren(...[...shown].reverse().map((flow) => arc(flow, middle, largest, longest)));
  }

  function arc([from, to, flow], middle, largest, longest) {
    const path = document.createElementNS(SVG, "path");
    const strength = Math.sqrt(flow / largest);
    const [start, stop] = [middle(from), middle(to)];
    // A curve swings out by three quarters of its handles.
    const x = (WIDTH * (1 - 1.28 * ((stop - start) / longest) ** 0.6)).toFixed(1);
    path.setAttribute("d", `M${WIDTH} ${start}C${x} ${start} ${x} ${stop} ${WIDTH} ${stop}`);
    path.setAttribute("stroke-width", Math.max(WIDEST * strength, NARROWEST).toFixed(2));
    path.setAttribute("stroke-opacity", (0.25 + 0.6 * strength).toFixed(2));
    Object.assign(path.dataset, { source: from, target: to });
    const title = document.createElementNS(SVG, "title");
    const [first, second] = [from, to].map((place) => rows[place].dataset.number);
    title.textContent = `step ${first} to step ${second}: ${tokens.percent(flow)}`;
    path.append(title);
    return path;
  }

  /** All rows from which flow reaches `row`, or which it reaches, along the flows that are shown. */
  function reached(row, from, to) {
    const found = new Set([row]);
    const ordered = [...shown].sort((one, other) => (from ? one[0] - other[0] : other[1] - one[1]));
    for (const flow of ordered) if (found.has(flow[from ? 0 : 1])) found.add(flow[to ? 1 : 0]);
    return found;
  }

  function mark(row) {
    const ancestors = row === null ? new Set() : reached(row, false, false);
    const descendants = row === null ? new Set() : reached(row, true, true);
    list.classList.toggle("picking", row !== null);
    rows.forEach((one, place) => {
      one.classList.toggle("upstream", place !== row && ancestors.has(place));
      one.classList.toggle("downstream", place !== row && descendants.has(place));
      one.classList.toggle("picked", place === row);
      one.querySelector("button").setAttribute("aria-pressed", place === kept);
    });
    for (const path of byId("arcs").children) {
      const [from, to] = [Number(path.dataset.source), Number(path.dataset.target)];
      path.classList.toggle("upstream", ancestors.has(from) && ancestors.has(to));
      path.classList.toggle("downstream", descendants.has(from) && descendants.has(to));
    }
  }

  const rowAt = (event) => {
    const place = rows.indexOf(event.target.closest("li"));
    return place < 0 ? null : place;
  };
  list.addEventListener("pointerover", (event) => mark(rowAt(event) ?? kept));
  list.addEventListener("focusin", (event) => mark(rowAt(event) ?? kept));
  list.addEventListener("pointerleave", () => mark(kept));
  list.addEventListener("focusout", () => mark(kept));
  list.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (link) {
      event.preventDefault();
      text.scrollTo(Number(link.dataset.first));
      return text.flash(Number(link.dataset.first), Number(link.dataset.last));
    }
    if (!event.target.closest("button")) return;
    kept = rowAt(event) === kept ? null : rowAt(event);
    mark(kept);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") mark((kept = null));
  });
  slider.addEventListener("input", draw);
  addEventListener("resize", arcs);
  draw();
})();
