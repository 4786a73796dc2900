(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  function signed(value) {
    const short = String(Number(Math.abs(value).toPrecision(3)));
    return value ? `${value < 0 ? "\u2212" : "+"}${short}` : "0";
  }

  function describe(unit) {
    if (!twoSides.columns.has(unit)) return twoSides.describe(unit);
    const { number, place } = twoSides.columns.get(unit);
    const column = data[number];
    const isTool = unit.classList.contains("tool");
    return {
      text: column.texts[place],
      where: [
        `completion ${number + 1}`,
        `token ${tokens.range(column.first?.[place] ?? place, column.last?.[place] ?? place)}`,
        unit.dataset.hub && `number ${unit.dataset.hub} by flow`,
        unit.classList.contains("answer") && "answer",
        isTool && "a tool wrote it: no credit",
      ],
      numbers: {
        weight: isTool ? "–" : `× ${column.weights[place]}`,
        throughput: tokens.percent(column.throughput[place]),
        "advantage × weight": signed(column.advantage * column.weights[place]),
      },
    };
  }

  tips.follow(twoSides.units, describe);
})();
