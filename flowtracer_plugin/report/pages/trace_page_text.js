/** The text: one token in detail, or one selected token with the tokens that its flow passes. */
const text = (() => {
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;
  const pane = byId("pane");
  const units = [...pane.querySelectorAll(".text > span")];
  const numberOf = new Map(units.map((unit, number) => [unit, number]));
  const rover = tokens.rove(units);
  const [LEAST, STRONG] = [0.01, 0.1];
  const [atSelection, atMark] = [[], []];
  let [selected, ranked] = [null, "some"];

  const literal = (unit) => tokens.literal(trace.text(unit));

  // Detail

  function show(unit) {
    pane.querySelector(".shown")?.classList.remove("shown");
    root.classList.toggle("inspecting", unit !== null);
    byId("hint").hidden = unit !== null;
    byId("facts").hidden = unit === null;
    byId("cursor").style.display = unit === null ? "none" : "block";
    if (unit === null) return;
    units[unit].classList.add("shown");
    byId("cursor").style.left = `${(100 * (unit + 0.5)) / trace.count}%`;
    byId("token").textContent = literal(unit);
    byId("where").textContent = places(unit).join(" · ");
    byId("amount").textContent = tokens.percent(trace.throughput[unit]);
    byId("reset").hidden = selected === null;
    byId("kept").hidden = unit !== selected;
    byId("inflow").textContent = `${tokens.percent(trace.throughput[unit])}, from`;
    byId("outflow").textContent = `${tokens.percent(trace.throughput[unit])}, to`;
    list("sources", unit, trace.injected(unit), "starts here");
    list("targets", unit, trace.absorbed(unit), "ends here, in the answer");
  }

  function places(unit) {
    const inPrompt = unit < trace.promptUnits;
    const rank = trace.ranks[ranked][unit];
    const { hub, checkpoint } = units[unit].dataset;
    return [
      `token ${trace.name(unit)}`,
      trace.region(unit),
      rank ? `rank ${rank} in the ${inPrompt ? "prompt" : "response"}` : "blank or formatting, without a rank",
      hub && `hub ${hub}`,
      checkpoint && `checkpoint ${checkpoint}`,
    ].filter(Boolean);
  }

  function list(side, unit, end, endName) {
    const edges = trace.edgesOf(unit, side).slice(0, 3);
    const items = edges.map((edge) => item(literal(edge.unit), edge.share, edge.unit));
    if (end > 0) items.unshift(item(endName, end / trace.throughput[unit], null));
    if (!items.length) items.push(item("nothing", 0, null));
    byId(side).replaceChildren(...items);
  }

  function item(said, share, unit) {
    const row = document.createElement(unit === null ? "span" : "button");
    const fill = document.createElement("span");
    fill.className = "fill";
    fill.style.width = `${Math.min(100 * share, 100)}%`;
    const name = document.createElement(unit === null ? "small" : "code");
    name.textContent = said;
    const amount = document.createElement("b");
    amount.textContent = share > 0 ? `${(100 * share).toFixed(1)}\u00a0%` : "";
    row.append(fill, name);
    if (unit !== null) {
      const place = document.createElement("small");
      place.textContent = trace.name(unit);
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

  const KINDS = { sources: "upstream", targets: "downstream" };

  function select(unit) {
    pane.querySelectorAll(".selected, .upstream, .downstream").forEach((element) => {
      element.classList.remove("selected", "upstream", "downstream", "strong");
    });
    selected = unit;
    root.classList.toggle("selecting", unit !== null);
    const kept = { sources: [], targets: [] };
    if (unit !== null) {
      for (const side of ["sources", "targets"]) kept[side] = keep(unit, side);
      units[unit].classList.add("selected");
      const [above, below] = [kept.sources.length, kept.targets.length];
      byId("kept").textContent = ` · kept: ${above} before it and ${below} after it that at least 1\u00a0% of this flow passes`;
    }
    // The srcdoc of a frame has no address that could be changed.
    if (location.protocol !== "about:") history.replaceState(null, "", unit === null ? location.pathname + location.search : `#t${trace.firstToken(unit)}`);
    atSelection.forEach((listen) => listen(kept));
    show(unit);
  }

  function keep(unit, side) {
    const kept = [];
    trace.carried(unit, side).forEach((share, other) => {
      if (share < LEAST || other === unit) return;
      units[other].classList.add(KINDS[side]);
      units[other].classList.toggle("strong", share >= STRONG);
      kept.push(other);
    });
    return kept;
  }

  // The fold of a long prompt

  const prompt = pane.querySelector(".part.prompt");

  /** Shows the whole prompt, or only its end. */
  function fold(on) {
    prompt.classList.toggle("folded", on);
    byId("unfold").setAttribute("aria-expanded", !on);
    byId("unfold").textContent = on ? unfoldName : "Fold the prompt";
  }
  const unfoldName = byId("unfold")?.textContent;
  byId("unfold")?.addEventListener("click", () => fold(!prompt.classList.contains("folded")));

  const isFolded = () => prompt?.classList.contains("folded");
  const foldTop = () => (isFolded() ? byId("fold").getBoundingClientRect().top : -Infinity);
  const reveal = (unit) => unit < trace.promptUnits && isFolded() && units[unit].getBoundingClientRect().top < foldTop() && fold(false);

  function scrollTo(unit, block = "center") {
    reveal(unit);
    units[unit].scrollIntoView({ block, behavior: "instant" });
  }

  function goTo(unit) {
    scrollTo(unit);
    rover.focus(unit);
    select(unit);
  }

  const unitAt = (event) => numberOf.get(event.target.closest?.(".text > span")) ?? null;
  const isTouch = (event) => event.pointerType === "touch";

  // Not pointerover, which also fires when the text scrolls beneath a resting pointer.
  pane.addEventListener("pointermove", (event) => {
    const unit = unitAt(event);
    if (unit === null || isTouch(event) || units[unit].classList.contains("shown")) return;
    byId("detail").setAttribute("aria-live", "off"); // a screen reader must not announce every token under the pointer
    show(unit);
  });
  pane.addEventListener("pointerleave", (event) => {
    const focused = numberOf.get(pane.querySelector(":focus-visible"));
    if (!isTouch(event)) show(focused ?? selected);
  });
  pane.addEventListener("focusin", (event) => {
    if (unitAt(event) === null) return;
    byId("detail").setAttribute("aria-live", "polite");
    reveal(unitAt(event));
    show(unitAt(event));
  });
  pane.addEventListener("click", (event) => {
    const unit = unitAt(event);
    if (unit === null || String(getSelection())) return;
    rover.focus(unit);
    select(unit === selected ? null : unit);
  });
  byId("reset").addEventListener("click", () => {
    rover.focus(selected); // before the button disappears
    select(null);
  });
  document.addEventListener("click", (event) => {
    const target = event.target.closest("[data-unit]");
    if (target) goTo(Number(target.dataset.unit));
  });

  /** To the answer, without a selection, so that the text stays as it is. */
  function toAnswer() {
    scrollTo(trace.answer);
    rover.focus(trace.answer);
    show(trace.answer);
  }
  byId("to-answer").addEventListener("click", toAnswer);

  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target === byId("query")) return;
    if (event.key === "Escape") return select(null);
    if (event.key === "a" && event.target !== byId("score")) return toAnswer();
    if (unitAt(event) !== null && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      return select(rover.current() === selected ? null : rover.current());
    }
    rover.step(event);
  });

  // Ranks

  /** Marks and lists hubs and checkpoints, among all units or without blanks, template and formatting. */
  function rank(all) {
    ranked = all ? "all" : "some";
    byId("plain").setAttribute("aria-pressed", all);
    document.querySelectorAll("tr.plain").forEach((row) => (row.hidden = !all));
    for (const [kind, marked] of Object.entries(trace.marks[ranked])) {
      units.forEach((unit) => delete unit.dataset[kind]);
      marked.forEach((unit, place) => (units[unit].dataset[kind] = place + 1));
      for (const cell of document.querySelectorAll(`#tokentable td.${kind}`)) {
        const place = marked.indexOf(Number(cell.parentElement.querySelector("button").dataset.unit));
        cell.textContent = cell.dataset.value = place < 0 ? "" : place + 1;
      }
    }
    atMark.forEach((listen) => listen(trace.marks[ranked]));
  }
  byId("plain")?.addEventListener("click", () => rank(ranked === "some"));

  // Shades and blanks

  const HEATS = [1, 2, 3, 4, 5].map((heat) => `h${heat}`);
  const byRank = units.map((unit) => HEATS.find((heat) => unit.classList.contains(heat)));
  const ofFlow = [...byRank];
  const isAnswer = (unit) => trace.region(unit) === "answer";
  const highest = trace.throughput.reduce((most, flow, unit) => (isAnswer(unit) ? most : Math.max(most, flow)), 0);

  /** From half of the highest throughput on, the heat is 5; from a quarter on, 4; and so on. */
  function byAmount(unit) {
    const heat = 6 + Math.floor(Math.log2(trace.throughput[unit] / (highest || 1)));
    return heat >= 1 ? HEATS[Math.min(heat, 5) - 1] : undefined;
  }

  function shade(amount) {
    root.classList.toggle("amount", amount);
    byId("by-rank").setAttribute("aria-pressed", !amount);
    byId("by-amount").setAttribute("aria-pressed", amount);
    units.forEach((unit, number) => {
      unit.classList.remove(...HEATS);
      const heat = amount ? byAmount(number) : byRank[number];
      if (heat) unit.classList.add(heat);
    });
  }
  byId("by-rank").addEventListener("click", () => shade(false));
  byId("by-amount").addEventListener("click", () => shade(true));

  /** The page knows only the ranks of other scores: the chosen score replaces the ranks of the flow. */
  byId("score")?.addEventListener("change", ({ target }) => {
    const shades = target.value === "" ? null : trace.scores[Number(target.value)];
    byId("by-amount").disabled = shades !== null;
    byId("shaded-by").textContent = shades ? target.selectedOptions[0].textContent : "throughput";
    units.forEach((_, number) => (byRank[number] = shades ? HEATS[shades[number] - 1] : ofFlow[number]));
    shade(false);
  });

  const GLYPHS = { " ": "·\u200b", "\t": "→\t", "\u00a0": "⍽", "\u3000": "□" };
  const written = new Map();

  function showBlanks(on) {
    root.classList.toggle("blanks", on);
    byId("blanks").setAttribute("aria-pressed", on);
    for (const unit of units) {
      for (const node of unit.childNodes) {
        if (node.nodeType !== Node.TEXT_NODE) continue;
        if (!on) node.data = written.get(node) ?? node.data;
        else if (/[ \t\u00a0\u3000]/.test(node.data)) {
          written.set(node, node.data);
          node.data = node.data.replace(/[ \t\u00a0\u3000]/g, (blank) => GLYPHS[blank]);
        }
      }
    }
    if (!on) written.clear();
  }
  byId("blanks").addEventListener("click", () => showBlanks(!root.classList.contains("blanks")));

  /** Lights up some tokens, so that readers find them. */
  function flash(first, last) {
    units.slice(first, last + 1).forEach((unit) => {
      unit.classList.add("flash");
      setTimeout(() => unit.classList.remove("flash"), 1600);
    });
  }

  return {
    units,
    select,
    goTo,
    scrollTo,
    foldTop,
    flash,
    focus: rover.focus,
    onSelect: (listen) => atSelection.push(listen),
    onMark: (listen) => atMark.push(listen),
  };
})();
