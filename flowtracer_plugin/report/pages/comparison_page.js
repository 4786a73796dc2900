(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { columns } = twoSides;
  const twins = new Map();
  for (const unit of columns.keys()) {
    const word = wordOf(unit);
    if (!twins.has(word)) twins.set(word, []);
    twins.get(word).push(unit);
  }

  /** The text of a token of any text, without the blanks around it. */
  function wordOf(unit) {
    const at = columns.get(unit);
    const text = at ? data[at.number].texts[at.place] : twoSides.describe(unit).text;
    return text.trim() || text;
  }

  function describe(unit) {
    if (!columns.has(unit)) return twoSides.describe(unit);
    const { number, place } = columns.get(unit);
    const column = data[number];
    const alike = twins.get(wordOf(unit));
    return {
      text: column.texts[place],
      where: [
        column.name,
        `token ${tokens.range(column.first[place], column.last[place])}`,
        unit.dataset.hub && `hub ${unit.dataset.hub}`,
        unit.classList.contains("answer") && "answer",
      ],
      numbers: {
        throughput: tokens.percent(column.throughput[place]),
        rank: `${column.ranks[place]}`,
        "in texts": `${new Set(alike.map((twin) => columns.get(twin).number)).size} of ${data.length}`,
      },
    };
  }

  let lit = [];
  function light(unit) {
    lit.forEach((twin) => twin.classList.remove("twin"));
    lit = (unit && twins.get(wordOf(unit))) ?? [];
    lit.forEach((twin) => twin.classList.add("twin"));
  }

  tips.follow(twoSides.units, describe, light);
})();
