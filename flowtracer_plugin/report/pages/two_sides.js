/** Texts side by side: the tokens of each column, and those of the beginning that all texts share. */
const twoSides = (() => {
  const data = JSON.parse(document.getElementById("differences")?.textContent ?? "null");
  const places = new Map();
  document.querySelectorAll(".text.shared > span").forEach((unit, place) => places.set(unit, place));

  /** Where each token of a column is: the number of the column, and the place in it. */
  const columns = new Map();
  document.querySelectorAll("article.completion").forEach((column, number) => {
    column.querySelectorAll(".text > span").forEach((unit, place) => columns.set(unit, { number, place }));
  });

  /** A difference of two shares, in percentage points. */
  function points(value) {
    const short = String(Number(Math.abs(100 * value).toPrecision(3)));
    return value ? `${value < 0 ? "\u2212" : "+"}${short} points` : "0 points";
  }

  /** A p-value with two significant digits. */
  const short = (p) => String(Number(p.toPrecision(2)));

  /** The card for a token that all texts share. */
  function describe(unit) {
    const known = data.shared[places.get(unit)];
    const [first, second, p, pCorrected] = known.numbers;
    const numbers = {
      [data.names[0]]: tokens.percent(first),
      [data.names[1]]: tokens.percent(second),
      difference: points(first - second),
    };
    if (p !== null) {
      numbers.p = short(p);
      numbers["p (corrected)"] = short(pCorrected);
    }
    return { text: known.text, where: ["in all texts", `token ${tokens.range(...known.tokens)}`], numbers };
  }

  return { describe, columns, units: [...places.keys(), ...columns.keys()] };
})();
