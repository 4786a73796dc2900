(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const root = document.documentElement;
  const pane = byId("pane");
  const units = [...pane.querySelectorAll(".text > span")];
  const numberOf = new Map(units.map((unit, number) => [unit, number]));
  const regions = { p: "prompt", q: "question", r: "reasoning", a: "answer" };
  const rover = tokens.rove(units);
  let selected = null;

  // Tokens

  const firstToken = (unit) => (data.starts ? data.starts[unit] : unit);
  const endToken = (unit) => (unit + 1 < units.length ? firstToken(unit + 1) : data.tokens.length);
  const tokenName = (unit) => tokens.range(firstToken(unit), endToken(unit) - 1);

  const literal = (unit) => tokens.literal(data.tokens.slice(firstToken(unit), endToken(unit)).join(""));

  /** The strongest edges of a unit: the unit at the other end, and its share of the throughput. */
  function edgesOf(unit, side) {
    const [width, sign] = [2 * data.edgesPerUnit, side === "sources" ? -1 : 1];
    const flat = data[side].slice(unit * width, (unit + 1) * width);
    const edges = [];
    for (let at = 0; at < flat.length && flat[at]; at += 2) {
      edges.push({ unit: unit + sign * flat[at], share: flat[at + 1] / 1000 });
    }
    return edges;
  }

  // Detail

  function show(unit) {
    pane.querySelector(".shown")?.classList.remove("shown");
    root.classList.toggle("inspecting", unit !== null);
    byId("hint").hidden = unit !== null;
    byId("facts").hidden = unit === null;
    byId("cursor").style.display = unit === null ? "none" : "block";
    if (unit === null) return;
    units[unit].classList.add("shown");
    byId("cursor").style.left = `${(100 * (unit + 0.5)) / units.length}%`;
    const inPrompt = unit < data.promptUnits;
    const population = inPrompt ? data.promptUnits : units.length - data.promptUnits;
    byId("token").textContent = literal(unit);
    const { hub, checkpoint } = units[unit].dataset;
    byId("where").textContent = [
      `token ${tokenName(unit)}`,
      regions[data.regions[unit]],
      `rank ${data.ranks[unit]} of ${population} in the ${inPrompt ? "prompt" : "response"}`,
      hub && `hub ${hub}`,
      checkpoint && `checkpoint ${checkpoint}`,
    ].filter(Boolean).join(" · ");
    byId("amount").textContent = tokens.percent(data.throughput[unit]);
    byId("reset").hidden = selected === null;
    list("sources", unit, "injected", "starts here");
    list("targets", unit, "absorbed", "ends here, in the answer");
  }

  function list(side, unit, end, endName) {
    const items = edgesOf(unit, side).slice(0, 3).map((edge) => item(literal(edge.unit), edge.share, edge.unit));
    const share = (data[end][unit] ?? 0) / data.throughput[unit];
    if (share > 0) items.unshift(item(endName, share, null));
    if (!items.length) items.push(item("nothing", 0, null));
    byId(side).replaceChildren(...items);
  }

  function item(text, share, unit) {
    const row = document.createElement(unit === null ? "span" : "button");
    const fill = document.createElement("span");
    fill.className = "fill";
    fill.style.width = `${Math.min(100 * share, 100)}%`;
    const name = document.createElement(unit === null ? "small" : "code");
    name.textContent = text;
    const amount = document.createElement("b");
    amount.textContent = share > 0 ? `${(100 * share).toFixed(1)}\u00a0%` : "";
    row.append(fill, name);
    if (unit !== null) {
      const place = document.createElement("small");
      place.textContent = tokenName(unit);
      row.type = "button";
      row.dataset.unit = unit;
      row.append(place);
    }
    row.append(amount);
    const entry = document.createElement("li");
    entry.append(row);
    return entry;
  }

  // Selection

  function select(unit) {
    for (const name of ["selected", "upstream", "downstream"]) {
      pane.querySelectorAll(`.${name}`).forEach((element) => element.classList.remove(name));
    }
    selected = unit;
    root.classList.toggle("selecting", unit !== null);
    if (unit !== null) {
      edgesOf(unit, "sources").forEach((edge) => units[edge.unit].classList.add("upstream"));
      edgesOf(unit, "targets").forEach((edge) => units[edge.unit].classList.add("downstream"));
      units[unit].classList.add("selected");
    }
    history.replaceState(null, "", unit === null ? location.pathname + location.search : `#t${firstToken(unit)}`);
    show(unit);
  }

  function goTo(unit, behavior = "auto") {
    units[unit].scrollIntoView({ block: "center", behavior });
    rover.focus(unit);
    select(unit);
  }

  const unitAt = (event) => numberOf.get(event.target.closest?.(".text > span")) ?? null;
  const isTouch = (event) => event.pointerType === "touch";

  pane.addEventListener("pointerover", (event) => {
    const unit = unitAt(event);
    if (unit !== null && !isTouch(event)) show(unit);
  });
  pane.addEventListener("pointerleave", (event) => isTouch(event) || show(selected));
  pane.addEventListener("focusin", (event) => unitAt(event) !== null && show(unitAt(event)));
  pane.addEventListener("click", (event) => {
    const unit = unitAt(event);
    if (unit === null || String(getSelection())) return;
    rover.focus(unit);
    select(unit === selected ? null : unit);
  });
  byId("reset").addEventListener("click", () => select(null));
  document.addEventListener("click", (event) => {
    const target = event.target.closest("[data-unit]");
    if (target) goTo(Number(target.dataset.unit));
  });

  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Escape") return select(null);
    if (unitAt(event) !== null && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      return select(rover.current() === selected ? null : rover.current());
    }
    rover.step(event);
  });

  // Ribbon

  /** The first unit whose lower edge lies beneath `y`; units follow each other down the page. */
  function firstBelow(y) {
    let [low, high] = [0, units.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (units[middle].getBoundingClientRect().bottom > y) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  function markWindow() {
    const first = firstBelow(byId("ribbon").getBoundingClientRect().bottom);
    const last = firstBelow(innerHeight);
    byId("window").style.left = `${(100 * first) / units.length}%`;
    byId("window").style.width = `${(100 * (last - first)) / units.length}%`;
  }

  byId("ribbon").addEventListener("click", (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const unit = Math.floor(((event.clientX - box.left) / box.width) * units.length);
    goTo(Math.min(Math.max(unit, 0), units.length - 1));
  });
  let waiting = false;
  const markSoon = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      markWindow();
    });
  };
  addEventListener("scroll", markSoon, { passive: true });
  addEventListener("resize", markSoon);

  // Steps

  const steps = byId("steplist");
  const rows = [...steps.querySelectorAll("li > button")];
  const arcs = [...steps.querySelectorAll("path")];

  function pick(row) {
    steps.classList.toggle("picking", row >= 0);
    for (const arc of arcs) {
      arc.classList.toggle("upstream", Number(arc.dataset.target) === row);
      arc.classList.toggle("downstream", Number(arc.dataset.source) === row);
    }
  }

  const pickAt = (event) => pick(rows.indexOf(event.target.closest("button")));
  steps.addEventListener("pointerover", pickAt);
  steps.addEventListener("focusin", pickAt);
  steps.addEventListener("pointerleave", () => pick(-1));
  steps.addEventListener("focusout", () => pick(-1));
  steps.addEventListener("click", (event) => {
    const row = event.target.closest("button");
    if (!row) return;
    const members = units.slice(Number(row.dataset.first), Number(row.dataset.last) + 1);
    members[0].scrollIntoView({ block: "center" });
    members.forEach((member) => {
      member.classList.add("flash");
      member.addEventListener("animationend", () => member.classList.remove("flash"), { once: true });
    });
  });

  markWindow();
  const linked = /^#t(\d+)$/.exec(location.hash);
  if (linked) {
    const unit = units.findIndex((_, number) => endToken(number) > Number(linked[1]));
    if (unit >= 0) goTo(unit, "instant");
  }
})();
