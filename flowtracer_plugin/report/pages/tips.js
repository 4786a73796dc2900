/** A small card beside the token under the pointer or in focus; each page fills it. */
const tips = (() => {
  const byId = (id) => document.getElementById(id);

  /** Puts the card beneath the token, or above it if there is no room beneath. */
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

  /** Shows the card for `units`. `describe` returns a unit's text, place and numbers by name; `changed` receives the unit that is shown, or null. */
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

    // Not pointerover, which also fires when the text scrolls beneath a resting pointer.
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
      show(unit); // a window in the background fires no focus event
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
