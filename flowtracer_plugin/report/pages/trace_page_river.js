/** The river: the numbers of the flow across one cut of the text. */
(() => {
  const byId = (id) => document.getElementById(id);
  const stream = byId("stream");
  const says = byId("cutsays");
  const { cuts, layers, passing } = trace.river;
  const names = [...document.querySelectorAll(".riverkey li")].map((one) => one.textContent.trim());
  const hint = says.textContent;
  const [forth, back] = [(by) => (cut) => cut + by, (by) => (cut) => cut - by];
  const moves = {
    ArrowRight: forth(1),
    ArrowUp: forth(1),
    PageUp: forth(10),
    ArrowLeft: back(1),
    ArrowDown: back(1),
    PageDown: back(10),
    Home: () => 0,
    End: () => cuts.length - 1,
  };
  let current = 0;

  /** A flag above each checkpoint. */
  function flag({ checkpoint }) {
    stream.querySelectorAll(".flag").forEach((one) => one.remove());
    for (const unit of checkpoint) {
      const one = document.createElement("span");
      [one.className, one.textContent] = ["flag", "⚑"];
      one.setAttribute("aria-hidden", true);
      one.style.left = `${(100 * (trace.endToken(unit) - 0.5)) / trace.tokenCount}%`;
      stream.append(one);
    }
  }
  flag(trace.marks.some);
  text.onMark(flag);

  function show(cut) {
    current = cut;
    byId("cut").style.left = `${(100 * cuts[cut]) / trace.tokenCount}%`;
    stream.classList.add("cutting");
    const parts = layers[cut].map((share, layer) => [share, names[layer]]).filter(([share]) => share >= 0.0005);
    const over = cut < passing.length ? `; ${tokens.percent(passing[cut])} passes over the tokens up to the next cut` : "";
    const where = cuts[cut] < trace.tokenCount ? `before token ${cuts[cut]}` : "after the last token";
    says.textContent = `${where}: ${parts.map(([share, name]) => `${tokens.percent(share)} ${name}`).join(", ")}${over}`;
    stream.setAttribute("aria-valuenow", cuts[cut]);
    stream.setAttribute("aria-valuetext", says.textContent);
  }

  function hide() {
    stream.classList.remove("cutting");
    says.textContent = hint;
  }

  const goTo = (cut) => text.goTo(trace.unitOf(Math.min(cuts[cut], trace.tokenCount - 1)));

  function cutAt(event) {
    const box = stream.getBoundingClientRect();
    const token = ((event.clientX - box.left) / box.width) * trace.tokenCount;
    return cuts.reduce((best, cut, place) => (Math.abs(cut - token) < Math.abs(cuts[best] - token) ? place : best), 0);
  }

  stream.addEventListener("pointermove", (event) => show(cutAt(event)));
  stream.addEventListener("pointerleave", hide);
  stream.addEventListener("focus", () => stream.matches(":focus-visible") && show(current));
  stream.addEventListener("blur", hide);
  stream.addEventListener("click", (event) => goTo(cutAt(event)));
  stream.addEventListener("keydown", (event) => {
    if (event.key === "Enter") goTo(current);
    const to = moves[event.key]?.(current);
    if (to === undefined) return;
    event.preventDefault();
    show(Math.min(Math.max(to, 0), cuts.length - 1));
  });
})();
