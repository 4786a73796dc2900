/** The river: what crosses the text at one cut, in numbers. */
(() => {
  const byId = (id) => document.getElementById(id);
  const stream = byId("stream");
  const says = byId("cutsays");
  const { cuts, layers, passing } = trace.river;
  const names = [...document.querySelectorAll(".riverkey li")].map((one) => one.textContent.trim());
  const hint = says.textContent;
  let current = 0;

  for (const flag of stream.querySelectorAll(".flag")) flag.style.left = `${flag.dataset.at}%`;

  function show(cut) {
    current = cut;
    byId("cut").style.left = `${(100 * cuts[cut]) / trace.tokenCount}%`;
    stream.classList.add("cutting");
    const parts = layers[cut].map((share, layer) => [share, names[layer]]).filter(([share]) => share >= 0.0005);
    const over = cut < passing.length ? `; ${tokens.percent(passing[cut])} passes over what follows` : "";
    const where = cuts[cut] < trace.tokenCount ? `before token ${cuts[cut]}` : "after the last token";
    says.textContent = `${where}: ${parts.map(([share, name]) => `${tokens.percent(share)} ${name}`).join(", ")}${over}`;
    stream.setAttribute("aria-valuenow", cuts[cut]);
    stream.setAttribute("aria-valuetext", says.textContent);
  }

  function hide() {
    stream.classList.remove("cutting");
    says.textContent = hint;
  }

  function cutAt(event) {
    const box = stream.getBoundingClientRect();
    const token = ((event.clientX - box.left) / box.width) * trace.tokenCount;
    return cuts.reduce((best, cut, place) => (Math.abs(cut - token) < Math.abs(cuts[best] - token) ? place : best), 0);
  }

  stream.addEventListener("pointermove", (event) => show(cutAt(event)));
  stream.addEventListener("pointerleave", hide);
  stream.addEventListener("focus", () => stream.matches(":focus-visible") && show(current));
  stream.addEventListener("blur", hide);
  stream.addEventListener("click", (event) => {
    const token = Math.min(cuts[cutAt(event)], trace.tokenCount - 1);
    text.goTo(trace.unitOf(token));
  });
  stream.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: cuts.length - 1 }[event.key];
    if (to === undefined || cuts[to] === undefined) return;
    event.preventDefault();
    show(to);
  });
})();
