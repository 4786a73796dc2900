/** A small card beside the token that is pointed at or in focus; the page says what it holds. */
const tips = (() => {
  const byId = (id) => document.getElementById(id);

  /** Beneath the token, or above it where there is no room. */
  function place(unit) {
    const tip = byId("tip");
    const [line] = unit.getClientRects();
    const gap = 8;
    const left = Math.min(line.left, document.documentElement.clientWidth - tip.offsetWidth - gap);
    const below = line.bottom + gap;
    const fits = below + tip.offsetHeight <= innerHeight;
    tip.style.left = `${Math.max(left, gap)}px`;
    tip.style.top = `${fits ? below : Math.max(line.top - gap - tip.offsetHeight, gap)}px`;
  }

  function fill({ text, where, numbers }) {
    byId("token").textContent = tokens.literal(text);
    byId("where").textContent = where.filter(Boolean).join(" · ");
    const cells = Object.entries(numbers).flatMap(([name, value]) => {
      const [term, number] = [document.createElement("dt"), document.createElement("dd")];
      [term.textContent, number.textContent] = [name, value];
      return [term, number];
    });
    byId("numbers").replaceChildren(...cells);
  }

  /** `describe` gives a unit's text, where it is, and its numbers by name; `changed` is told which is shown. */
  function follow(units, describe, changed = () => {}) {
    const known = new Set(units);
    const rover = tokens.rove(units);
    let pointed = null;

    function show(unit) {
      document.querySelector(".shown")?.classList.remove("shown");
      byId("tip").hidden = unit === null;
      changed(unit);
      if (unit === null) return;
      unit.classList.add("shown");
      fill(describe(unit));
      place(unit);
    }

    const unitAt = (event) => {
      const unit = event.target.closest?.(".text > span");
      return known.has(unit) ? unit : null;
    };
    const focused = () => (known.has(document.activeElement) ? document.activeElement : null);

    // Not pointerover, which a text tells as well that scrolls beneath a pointer at rest.
    document.addEventListener("pointermove", (event) => {
      const unit = unitAt(event);
      if (event.pointerType === "touch" || unit === pointed) return;
      pointed = unit;
      show(unit ?? focused());
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
  }

  return { follow };
})();
