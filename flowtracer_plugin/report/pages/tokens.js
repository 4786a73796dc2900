"use strict";
/** Shared by all scripts: numbers, texts, and moving from token to token by keyboard. */
const tokens = (() => {
  /** The exact text as a string literal; invisible characters are escaped. */
  function literal(text) {
    const hidden = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu;
    return JSON.stringify(text).replace(hidden, (char) => `\\u{${char.codePointAt(0).toString(16)}}`);
  }

  function percent(share) {
    const number = Number((100 * share).toPrecision(3));
    if (number > 0 && number < 0.001) return "<\u00a00.001\u00a0%";
    const decimals = number ? Math.min(2 - Math.floor(Math.log10(number)), 3) : 0;
    return `${number.toFixed(Math.max(decimals, 0))}\u00a0%`;
  }

  /** Token numbers as `5` or `5–7`. */
  const range = (first, last) => (first === last ? `${first}` : `${first}–${last}`);

  /** Makes one token at a time reachable with Tab; keys move on from it, see `step`. */
  function rove(units) {
    const isMarked = ({ dataset }) => dataset.hub || dataset.checkpoint;
    const after = (unit) => units.findIndex((one, number) => number > unit && isMarked(one));
    const moves = {
      ArrowLeft: (unit) => unit - 1,
      ArrowRight: (unit) => unit + 1,
      j: after,
      k: (unit) => units.slice(0, unit).findLastIndex(isMarked),
    };
    let current = 0;

    /** Only the reachable token is a button; thousands of buttons would overwhelm a screen reader. */
    function reach(unit) {
      units[current].removeAttribute("tabindex");
      units[current].removeAttribute("role");
      current = unit;
      units[unit].tabIndex = 0;
      units[unit].setAttribute("role", "button");
    }
    if (units.length) reach(current);

    function focus(unit) {
      reach(unit);
      units[unit].focus({ preventScroll: true });
    }

    /** The arrow keys lead to the neighbours of a token; j and k lead to marked tokens from anywhere. */
    function step(event) {
      const inText = event.target.closest?.(".text > span");
      const unit = (inText || event.key.length === 1 ? moves[event.key] : undefined)?.(current);
      if (unit === undefined || !units[unit]) return;
      event.preventDefault();
      focus(unit);
      units[unit].scrollIntoView({ block: "nearest" });
    }

    return { focus, step, current: () => current };
  }

  return { literal, percent, range, rove };
})();
