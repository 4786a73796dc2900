/** The ribbon: it shows which part of the text is in view, and scrolls the text. */
(() => {
  const ribbon = document.getElementById("ribbon");
  const view = document.getElementById("window");
  const { units } = text;

  /** The first unit in view whose lower edge lies beneath `y`, by bisection. */
  function firstBelow(y) {
    const fold = text.foldTop(); // the folded part of the prompt lies above it, but not in view
    let [low, high] = [0, units.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (units[middle].getBoundingClientRect().bottom > (middle < trace.promptUnits ? Math.max(y, fold) : y)) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  function markWindow() {
    const first = firstBelow(ribbon.getBoundingClientRect().bottom);
    const last = firstBelow(innerHeight);
    view.style.display = first < last ? "block" : "none";
    view.style.left = `${(100 * first) / units.length}%`;
    view.style.width = `${(100 * (last - first)) / units.length}%`;
  }

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

  function unitAt(event) {
    const box = ribbon.getBoundingClientRect();
    const unit = Math.floor(((event.clientX - box.left) / box.width) * units.length);
    return Math.min(Math.max(unit, 0), units.length - 1);
  }

  let [start, dragged] = [null, false];
  ribbon.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    [start, dragged] = [event.clientX, false];
    ribbon.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  ribbon.addEventListener("pointermove", (event) => {
    if (start === null) return;
    dragged ||= Math.abs(event.clientX - start) > 4;
    if (dragged) text.scrollTo(unitAt(event));
  });
  ribbon.addEventListener("pointerup", (event) => {
    if (start !== null && !dragged) text.goTo(unitAt(event));
    start = null;
  });
  ribbon.addEventListener("pointercancel", () => (start = null));

  // A bar of the ribbon may hold several units.
  const width = ribbon.querySelector("svg").viewBox.baseVal.width;
  const ticks = (kept, y) => {
    const bars = new Set(kept.map((unit) => Math.floor((unit * width) / units.length)));
    return [...bars].map((bar) => `M${bar + 0.5} ${y}v12`).join("");
  };
  text.onSelect((kept) => {
    document.getElementById("above").setAttribute("d", ticks(kept.sources, 88));
    document.getElementById("below").setAttribute("d", ticks(kept.targets, 88));
  });

  text.onMark(({ hub }) => {
    const at = (unit) => (((unit + 0.5) * width) / units.length).toFixed(2);
    document.getElementById("marks").setAttribute("d", hub.map((unit) => `M${at(unit)} 0v12`).join(""));
  });

  markWindow();
})();
