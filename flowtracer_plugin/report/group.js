(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const tip = byId("tip");
  const units = [];
  const places = new Map();
  document.querySelectorAll(".completion").forEach((column, number) => {
    column.querySelectorAll(".text > span").forEach((unit, place) => {
      places.set(unit, { number, place });
      units.push(unit);
    });
  });
  const rover = tokens.rove(units);

  function signed(value) {
    const short = String(Number(Math.abs(value).toPrecision(3)));
    return value ? `${value < 0 ? "\u2212" : "+"}${short}` : "0";
  }

  function fill(unit) {
    const { number, place } = places.get(unit);
    const column = data[number];
    const isTool = unit.classList.contains("tool");
    byId("token").textContent = tokens.literal(column.texts[place]);
    byId("where").textContent = [
      `completion ${number + 1}`,
      `token ${tokens.range(column.first?.[place] ?? place, column.last?.[place] ?? place)}`,
      unit.dataset.hub && `hub ${unit.dataset.hub}`,
      unit.classList.contains("answer") && "answer",
      isTool && "a tool wrote it: no credit",
    ].filter(Boolean).join(" · ");
    byId("weight").textContent = isTool ? "–" : `× ${column.weights[place]}`;
    byId("throughput").textContent = tokens.percent(column.throughput[place]);
    byId("credit").textContent = signed(column.advantage * column.weights[place]);
  }

  /** Beneath the token, or above it where there is no room. */
  function place(unit) {
    const [line] = unit.getClientRects();
    const gap = 8;
    const left = Math.min(line.left, document.documentElement.clientWidth - tip.offsetWidth - gap);
    const below = line.bottom + gap;
    const fits = below + tip.offsetHeight <= innerHeight;
    tip.style.left = `${Math.max(left, gap)}px`;
    tip.style.top = `${fits ? below : Math.max(line.top - gap - tip.offsetHeight, gap)}px`;
  }

  function show(unit) {
    document.querySelector(".shown")?.classList.remove("shown");
    tip.hidden = unit === null;
    if (unit === null) return;
    unit.classList.add("shown");
    fill(unit);
    place(unit);
  }

  const unitAt = (event) => {
    const unit = event.target.closest?.(".text > span");
    return places.has(unit) ? unit : null;
  };
  const focused = () => (places.has(document.activeElement) ? document.activeElement : null);

  document.addEventListener("pointerover", (event) => {
    if (event.pointerType !== "touch") show(unitAt(event) ?? focused());
  });
  document.addEventListener("focusin", (event) => show(unitAt(event)));
  document.addEventListener("click", (event) => {
    const unit = unitAt(event);
    if (unit === null) return show(null);
    if (String(getSelection())) return;
    rover.focus(units.indexOf(unit));
    show(unit); // a window in the background tells nobody of a new focus
  });
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Escape") return show(null);
    rover.step(event);
    if (event.defaultPrevented) show(focused());
  });
  addEventListener("scroll", () => (focused() ? place(focused()) : show(null)), { passive: true });
})();
