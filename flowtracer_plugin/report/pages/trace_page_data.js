/** The data of the trace by unit; a unit is a token, or several tokens that spell one character. */
const trace = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const throughput = new Float32Array(bytes(data.throughput).buffer);
  const packed = { sources: bytes(data.edges.sources), targets: bytes(data.edges.targets) };
  const count = throughput.length;
  const regions = { p: "prompt", q: "question", r: "reasoning", a: "answer" };
  const answered = data.regions.lastIndexOf("a");

  const firstToken = (unit) => (data.starts ? data.starts[unit] : unit);
  const endToken = (unit) => (unit + 1 < count ? firstToken(unit + 1) : data.tokens.length);

  /** The unit of a token. */
  function unitOf(token) {
    let [low, high] = [0, count - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (endToken(middle) > token) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  /** The strongest edges of a unit: the unit at the other end, and the edge's share of the throughput. */
  function edgesOf(unit, side) {
    const { perUnit, width } = data.edges;
    const [sign, edges] = [side === "sources" ? -1 : 1, []];
    for (let edge = unit * perUnit; edge < (unit + 1) * perUnit; edge++) {
      let value = 0;
      for (let at = width - 1; at >= 0; at--) value = 256 * value + packed[side][edge * width + at];
      if (!value) break;
      edges.push({ unit: unit + sign * Math.floor(value / 1024), share: (value % 1024) / 1000 });
    }
    return edges;
  }

  /** For each unit on one side, the share of this unit's flow that passes it along the known edges. */
  function carried(unit, side) {
    const shares = new Float32Array(count);
    shares[unit] = 1;
    const [step, end] = side === "sources" ? [-1, -1] : [1, count];
    for (let at = unit; at !== end; at += step) {
      if (shares[at] < 0.001) continue;
      for (const edge of edgesOf(at, side)) shares[edge.unit] += shares[at] * edge.share;
    }
    return shares;
  }

  /** Ranks by throughput within the prompt or the response, from 1 on, as `rank of size`; units in `without` have none. */
  function ranksOf(without) {
    const found = Array(count);
    for (const [from, to] of [[0, data.promptUnits], [data.promptUnits, count]]) {
      const order = Array.from({ length: to - from }, (_, place) => from + place).filter((unit) => !without.has(unit));
      order.sort((one, other) => throughput[other] - throughput[one] || one - other);
      order.forEach((unit, place) => (found[unit] = `${place + 1} of ${order.length}`));
    }
    return found;
  }

  return {
    count,
    throughput,
    scores: data.scores,
    marks: data.marks,
    ranks: { some: ranksOf(new Set(data.plain)), all: ranksOf(new Set()) },
    answer: data.regions.indexOf("a"),
    steps: data.steps,
    river: data.river,
    tokenCount: data.tokens.length,
    promptUnits: data.promptUnits,
    injected: (unit) => data.injected[unit] ?? 0,
    absorbed: (unit) => data.absorbed[unit] ?? 0,
    region: (unit) => (unit > answered ? "after the answer" : regions[data.regions[unit]]),
    text: (unit) => data.tokens.slice(firstToken(unit), endToken(unit)).join(""),
    name: (unit) => tokens.range(firstToken(unit), endToken(unit) - 1),
    firstToken,
    endToken,
    unitOf,
    edgesOf,
    carried,
  };
})();
