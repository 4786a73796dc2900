(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const places = new Map();
  const twins = new Map();
  const units = [...shared.units];
  const key = (text) => text.trim() || text;
  document.querySelectorAll("article.completion").forEach((column, number) => {
    column.querySelectorAll(".text > span").forEach((unit, place) => {
      const word = key(data[number].texts[place]);
      places.set(unit, { number, place, word });
      if (!twins.has(word)) twins.set(word, []);
      twins.get(word).push(unit);
      units.push(unit);
    });
  });

  function describe(unit) {
    if (!places.has(unit)) return shared.describe(unit);
    const { number, place, word } = places.get(unit);
    const column = data[number];
    const alike = twins.get(word);
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
        "in texts": `${new Set(alike.map((twin) => places.get(twin).number)).size} of ${data.length}`,
      },
    };
  }

  let lit = [];
  function light(unit) {
    lit.forEach((twin) => twin.classList.remove("twin"));
    lit = (unit && twins.get(places.get(unit)?.word ?? key(shared.describe(unit).text))) ?? [];
    lit.forEach((twin) => twin.classList.add("twin"));
  }

  tips.follow(units, describe, light);
})();
