/** Search: `/` focuses the field, Enter goes to the next match, Shift+Enter to the previous one. */
(() => {
  const field = document.getElementById("query");
  const says = document.getElementById("matches");
  // Unit by unit, since some texts become longer in lower case, which would shift later matches.
  const lowered = Array.from({ length: trace.count }, (_, unit) => trace.text(unit).toLowerCase());
  const starts = [];
  let length = 0;
  for (const part of lowered) {
    starts.push(length);
    length += part.length;
  }
  const whole = lowered.join("");
  let [places, current] = [[], -1];

  /** The unit of a character of the whole text. */
  function unitAt(character) {
    let [low, high] = [0, starts.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (starts[middle] <= character) low = middle;
      else high = middle - 1;
    }
    return low;
  }

  function find() {
    text.units.forEach((unit) => unit.classList.remove("found", "current"));
    const wanted = field.value.toLowerCase();
    [places, current] = [[], -1];
    for (let at = wanted ? whole.indexOf(wanted) : -1; at >= 0; at = whole.indexOf(wanted, at + wanted.length)) {
      places.push([unitAt(at), unitAt(at + wanted.length - 1)]);
    }
    for (const [first, last] of places) mark(first, last, "found");
    if (places.length) step(1);
    else says.textContent = wanted ? "none" : "";
  }

  const mark = (first, last, name) => text.units.slice(first, last + 1).forEach((unit) => unit.classList.add(name));

  function step(by) {
    if (!places.length) return;
    text.units.forEach((unit) => unit.classList.remove("current"));
    current = (current + by + places.length) % places.length;
    mark(...places[current], "current");
    text.scrollTo(places[current][0]);
    says.textContent = `${current + 1} of ${places.length}`;
  }

  field.addEventListener("input", find);
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter") {
      event.preventDefault();
      step(event.shiftKey ? -1 : 1);
    } else if (event.key === "Escape") {
      field.value = "";
      find();
      field.blur();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target === field) return;
    event.preventDefault();
    field.focus();
    field.select();
  });
})();
